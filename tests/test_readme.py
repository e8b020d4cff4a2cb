"""Every command and every file of the README, as written."""

import re
import shlex

import jax
import pytest

import runs
from efficientllm import main, model
from efficientllm.run import import_plugins
from efficientllm.train import step

README = (runs.ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RUNS = [command.partition("python -m efficientllm.main ")[2] for command in COMMANDS if "efficientllm.main" in command]
INSTALL = "pip install -e . && python -m efficientllm.main --config=configs/moe.py"
TEST = "pip install -e '.[test]' && pytest"


def test_there_is_no_command_that_nothing_runs():
    others = [command for command in COMMANDS if "efficientllm.main" not in command]
    assert INSTALL in COMMANDS
    assert others == [TEST, "tensorboard --logdir=runs"]  # CI runs the first; test_tensorboard asks the second's server
    assert README.count("python -m efficientllm.main") == len(RUNS)


@pytest.mark.parametrize("command", RUNS)
def test_command(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(runs.ROOT))
    files = dict(re.findall(r"save it as `(\w+\.py)`:\n\n```python\n(.*?)```", README, re.DOTALL))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for i, section in enumerate(README.split("\n## ")):
        (tmp_path / f"{i}.md").write_text(section * 5)
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command.replace("--config=", f"--config={runs.ROOT}/"))
    config, _, _ = main.parse(argv)
    if config.model.size != "tiny":  # a size for a cluster: all but its arrays
        import_plugins(config.imports)
        lm = model.from_config(config.model, 4096)
        jax.eval_shape(step.init_state(lm, config.train, config.seed, config.train.length))
        return
    text = [f"--config.data=text(path='{tmp_path}/*.md')", "--config.tokenizer=bytes"]
    data = [] if "config.data" in command else text
    short = ["train.steps=2", "train.length=32", "eval.batches=1", "sample.tokens=2", "model.size=tiny(num_layers=1)"]
    assert main.main([*argv, *data, *[f"--config.{each}" for each in short]]) == 0
    assert list((tmp_path / "runs").glob("*/*/record.json"))
