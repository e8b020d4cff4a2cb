"""Every command and every file of the README, as written."""

import io
import json
import re
import shlex
import subprocess
import sys

import flax.linen as nn
import jax
import pytest
from convert import folders
from data import kinds
from report import made

import runs
from configs import base
from efficientllm import chat, convert, main
from efficientllm.architecture import from_config
from efficientllm.config.plain import plain
from efficientllm.convert import __main__ as convert_command
from efficientllm.convert import peft as adapters
from efficientllm.registry import build
from efficientllm.registry.plugins import import_plugins
from efficientllm.report import __main__ as report
from efficientllm.sweep import __main__ as sweep
from efficientllm.train import step

README = (runs.ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RUNS = [command.partition("python -m efficientllm.main ")[2] for command in COMMANDS if "efficientllm.main" in command]
REPORTS = [command for command in COMMANDS if "efficientllm.report" in command]
SWEEPS = [command for command in COMMANDS if "efficientllm.sweep" in command]
INSTALL = "pip install -e . && python -m efficientllm.main --config=configs/moe.py"
TEST = "pip install -e '.[test]' && pytest"
CHAT = "python -m efficientllm.chat runs/tune_rslora"
MERGE = "python -m efficientllm.convert smollm2-135m --merge=runs/tune_rslora/adapter --out=merged"
SMALLEST = "tiny(num_layers=1, dim=64, num_heads=2, num_kv_heads=1, head_dim=32, hidden=128)"
CONTRACT = "pytest tests/test_contract.py --imports=experiments/my_attention/gated.py -k gated"


def test_there_is_no_command_that_nothing_runs():
    tested = [*REPORTS, *SWEEPS]
    others = [command for command in COMMANDS if "efficientllm.main" not in command and command not in tested]
    assert INSTALL in COMMANDS
    # CI runs the first, test_tensorboard asks the second's server; the doctor and merging have tests of their own.
    assert others == [TEST, "tensorboard --logdir=runs", "python -m efficientllm.doctor", CHAT, MERGE, CONTRACT]
    assert README.count("python -m efficientllm.main") == len(RUNS)


@pytest.mark.parametrize("command", RUNS)
def test_command(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(runs.ROOT))
    for path in runs.ROOT.glob("*.md"):  # as in a clone
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "texts").mkdir()
    for i, section in enumerate(README.split("\n## ")):
        (tmp_path / "texts" / f"{i}.md").write_text(section * 5)
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command.replace("--config=", f"--config={runs.ROOT}/"))
    config, _, _ = main.parse(argv)
    if config.model.pretrained:
        folders.llama(tmp_path / "model", vocab_size=300)
        argv += [f"--config.model.pretrained={tmp_path / 'model'}", "--config.train.batch_size=8"]
        few = ("chat=False", "repeats=1", "prompt_length=8", "max_new_tokens=4")
        argv += [f"--config.infer.{each}" for each in few]
    if config.model.size != "tiny":  # a size for a cluster: all but its arrays
        import_plugins(config.imports)
        lm = from_config.from_config(config.model, 4096)
        jax.eval_shape(step.init_state(lm, config.train, config.seed, config.train.length))
        return
    text = [f"--config.data=text(path='{tmp_path}/texts')", "--config.tokenizer=bytes"]
    data = [] if "config.data" in command else text
    short = ["train.steps=2", "train.length=32", "eval.batches=1", f"model.size={SMALLEST}"]
    short += [f"sample.tokens={2 if command == RUNS[0] else 0}"]  # one of them shows a text: it is compiled for itself
    assert main.main([*argv, *data, *[f"--config.{each}" for each in short]]) == 0
    assert list((tmp_path / "runs").glob("*/*/record.json"))


def test_merging(tmp_path, monkeypatch):
    """MERGE, with a model and an adapter made here."""
    monkeypatch.chdir(tmp_path)
    source = _write_adapter(tmp_path / "model", tmp_path / "runs/tune_rslora/adapter")
    argv = shlex.split(MERGE.replace("smollm2-135m", "model").partition("efficientllm.convert ")[2])
    assert convert_command.main(argv) == 0
    assert convert.open_source(tmp_path / "merged").model == source.model


def test_talking(tmp_path, monkeypatch, capsys):
    """CHAT, with the model and what is left of a run made here."""
    monkeypatch.chdir(tmp_path)
    tuned = tmp_path / "runs" / "tune_rslora" / "0123456789ab"
    _write_adapter(tmp_path / "model", tuned / "adapter")
    argv = shlex.split(next(command for command in RUNS if "rslora" in command).replace("smollm2-135m", "model"))
    monkeypatch.syspath_prepend(str(runs.ROOT))
    config, _, _ = main.parse([argv[0].replace("--config=", f"--config={runs.ROOT}/"), *argv[1:]])
    (tuned / "config.json").write_text(json.dumps(plain(config)))
    kinds.save(tmp_path / "model", eos_token="<eos>")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert chat.main([*shlex.split(CHAT.partition("efficientllm.chat ")[2]), "--config.infer.max_new_tokens=4"]) == 0
    assert "1 answer: TTFT" in capsys.readouterr().err


def _write_adapter(model, folder):
    """A model of 300 tokens and an adapter around it, which has learnt nothing."""
    folders.llama(model, vocab_size=300)
    source = convert.open_source(model)
    lm, method = source.lm(), build("adapter", "rslora(rank=2)")
    state = step.init_state(lm, base.get_config().train, 0, 8, method)
    adapters.write(lm, "rslora(rank=2)", nn.unbox(state()).params, folder, source)
    return source


def test_sweeps_are_described(monkeypatch, capsys):
    """The second runs what the first shows; test_sweep.py runs such runs."""
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    dry, real = (shlex.split(command.partition("efficientllm.sweep ")[2]) for command in SWEEPS)
    assert dry == [real[0], "--dry_run"]
    assert sweep.main([*real, "--dry_run"]) == 0 and "21 runs in 3 blocks" in capsys.readouterr().out


def test_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, mixer in (("base", "gqa"), ("moe", "mqa")):
        for seed in range(3):
            made.row(tmp_path / "runs" / name / str(seed), mixer, seed=seed, al_s=0.5 + 0.001 * seed, eval_loss=5.0)
    assert [report.main(shlex.split(command.partition("efficientllm.report ")[2])) for command in REPORTS] == [0, 0]
    assert (tmp_path / "report" / "index.html").exists()


def test_the_worked_example_is_the_file_and_passes_the_contract_suite():
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown == (runs.ROOT / "experiments/my_attention/gated.py").read_text()
    argv = [sys.executable, "-m", *shlex.split(CONTRACT), "-n", "0"]
    done = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"(\d+) passed", done.stdout), done.stdout + done.stderr
