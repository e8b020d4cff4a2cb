"""Every command of experiments/my_techniques, as written."""

import re
import shlex
import subprocess
import sys

import pytest

import runs
from convert import folders
from efficientllm import base_config, main
from tiers import slow_except

README = (runs.ROOT / "experiments/my_techniques/README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RUNS = [command.partition("efficientllm.main ")[2] for command in COMMANDS if "efficientllm.main" in command]
SUITES = [shlex.split(command.partition("pytest ")[2]) for command in COMMANDS if command.startswith("pytest ")]
SIZE = "tiny(num_layers=1, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=48)"


def test_there_is_no_command_that_nothing_runs():
    assert len(RUNS) + len(SUITES) == len(COMMANDS) == 13


@pytest.mark.parametrize(
    "command",
    slow_except(RUNS, *(command for command in RUNS if command.endswith("sampler"))),
    ids=lambda command: command.rpartition(":")[2],
)
def test_a_part_runs(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(runs.ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text((runs.ROOT / "README.md").read_text())
    argv = shlex.split(command.replace("--config=", f"--config={runs.ROOT}/"))
    config, *_ = main.parse(argv)
    short = ["train.steps=2", "train.length=32", "eval.batches=1", "sample.tokens=2"]
    if config.model.pretrained:
        folders.llama(tmp_path / "model", vocab_size=300)
        short += [f"model.pretrained={tmp_path / 'model'}", "infer.chat=False", "infer.repeats=1"]
        short += ["infer.prompt_length=8", "infer.max_new_tokens=4"]
    else:
        short += [f"model.size={SIZE}"]
    if config.data == "python_docs()":
        short += ["data=text(path='README.md')"]
    if config.tokenizer in (base_config.get_config().tokenizer, "pretrained"):
        short += ["tokenizer=bytes"]
    assert main.main([*argv, *[f"--config.{override}" for override in short]]) == 0
    assert list((tmp_path / "runs").glob("my_*/*/record.json"))


def suite(argv):
    argv = [sys.executable, "-m", "pytest", *argv, "-n", "0"]
    done = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout.replace("[100%]", "passed"), done.stdout + done.stderr


def test_the_contract_suite_passes_those_without_a_model():
    """The commands of the optimizer, the sources and the sampler in one process, which takes as long as one."""
    light = [argv for argv in SUITES if any(name in argv[1] for name in ("optimizer", "source", "pictures", "sampler"))]
    imports = ",".join(argv[1].partition("=")[2] for argv in light)
    suite([light[0][0], f"--imports={imports}", "-k", " or ".join(argv[3] for argv in light)])


@pytest.mark.slow
@pytest.mark.parametrize("argv", SUITES, ids=lambda argv: argv[3])
def test_the_contract_suite_passes(argv):
    suite(argv)
