"""The command line before any run: help, slips and their hints, and how fast they answer."""

import resource
import subprocess
import sys

import pytest

import runs
from efficientllm import main

pytestmark = pytest.mark.quick

MOE = f"--config={runs.ROOT}/configs/moe.py"


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--confg=x"],
            "--confg: no such flag; flags: --config, --config.key, --workdir, --overwrite, --init; did you mean",
        ),
        ([f"--config={runs.ROOT}/configs/mo.py"], "no such file; did you mean"),
        ([MOE, "--config.train.stps=3"], "--config.train.stps=3: the config has no key 'stps'; did you mean 'steps'?"),
        ([MOE, "--config.trai.steps=3"], "the config has no key 'trai'; did you mean 'train'?"),
        ([MOE, "--config.train.steps=many"], "config.train.steps = 'many': must be at least 1"),
        ([f"{MOE}:big"], "its get_config() takes no name; leave :big out"),
        ([MOE, "extra"], "extra: is not a flag"),
        (["--workdir=x"], "--config: is missing; write --config=FILE"),
    ],
)
def test_a_slip_is_one_line_and_status_2(argv, message, capsys):
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("efficientllm: ") and error.count("\n") == 1


@pytest.mark.parametrize("argv, status", [(["--help"], 0), ([], 2), (["--confg=configs/moe.py"], 2)])
def test_help_and_slips_answer_without_importing_jax(argv, status):
    code = "import sys; from efficientllm import main; s = main.main(sys.argv[1:]); print('jax' in sys.modules, s)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"False {status}", done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own time: other tests keep the cores busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
