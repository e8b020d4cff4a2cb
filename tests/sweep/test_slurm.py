"""Sweeps on a real Slurm of one node: one array, one run an allocation, every end a row."""

import functools
import json
import subprocess
import sys

import pytest

import runs as small
from efficientllm.errors import UserError
from efficientllm.sweep import Sweep, execute, slurm, spec
from sweep import cluster

submitit = pytest.importorskip("submitit", reason="pip install -e '.[sweep]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing()),
    # A Slurm that does not account answers no question about jobs that are gone.
    pytest.mark.filterwarnings("ignore:Call #.*Bypassing sacct"),
]

# A program in the place of a run, which notes when it ran.
PROGRAM = """
import json, os, pathlib, sys, time
argv = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
folder, what, began = pathlib.Path(argv["workdir"]), argv["config.what"], time.time()
time.sleep(1)
with open(folder.parent / "ran.txt", "a") as log:
    log.write(json.dumps([folder.name, os.environ["SLURM_JOB_ID"], began, time.time()]) + "\\n")
if what == "kill":  # the allocation and everything in it
    os.system("scancel --signal=KILL --full " + os.environ["SLURM_JOB_ID"])
    time.sleep(60)
if what == "crash":
    sys.exit(1)
from efficientllm.record.row import build_record, write_record
row = build_record(outcome=what, name="x", task="pretrain", config={}, provenance={})
write_record(row, folder / "record.json")
"""


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory):
    with cluster.running(tmp_path_factory.mktemp("slurm") / "cluster") as config, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", config)
        patch.setenv("PYTHONPATH", f"{small.ROOT}:{small.ROOT / 'tests'}")
        yield config


def sweep(**whats):
    variants = {name: ("configs/base.py", {"what": what}) for name, what in whats.items()}
    return Sweep(name="test", baseline="a", variants=variants, seeds=(0,), twice=False, timeout_s=120)


def submit(compared, out, monkeypatch):
    program = functools.partial(execute.execute_run, command=(sys.executable, "-c", PROGRAM))
    with monkeypatch.context() as patch:
        patch.setattr(slurm, "start", program)
        return slurm.submit_runs(slurm.open_executor(out), list(spec.list_runs(compared)), out, compared, poll_s=0.5)


def ran(out):
    return [json.loads(line) for line in (out / "ran.txt").read_text().splitlines()]


def test_every_end_is_a_row_and_runs_are_alone(slurm_conf, tmp_path, monkeypatch):
    out, compared = tmp_path / "out", sweep(a="ok", b="nan", c="crash", d="kill")
    runs = list(spec.list_runs(compared))
    outcomes = dict(zip([run.variant for run in runs], submit(compared, out, monkeypatch), strict=True))
    assert outcomes == {"a": "ok", "b": "nan", "c": "crash", "d": "crash"}
    for run in runs:
        assert json.loads((out / run.folder / "record.json").read_text())["sweep"] == run.place
    # One array, an allocation for each run, and no two at a time on the node.
    assert len({job for _, job, *_ in ran(out)}) == len(runs)
    times = sorted((began, ended) for _, _, began, ended in ran(out))
    assert all(after[0] >= before[1] for before, after in zip(times, times[1:], strict=False))
    assert len(list((out / "slurm").glob("*_submission.sh"))) == 1

    # The same command submits nothing that has a row, and one that failed after it was asked for.
    assert submit(compared, out, monkeypatch) == [outcomes[run.variant] for run in runs]
    assert len(ran(out)) == len(runs)
    (failed,) = (run for run in runs if run.variant == "c")
    execute.set_row_aside(out / failed.folder)
    submit(compared, out, monkeypatch)
    assert [name for name, *_ in ran(out)][len(runs) :] == [failed.folder]


def test_what_slurm_refuses_is_one_line(slurm_conf, tmp_path):
    executor = slurm.open_executor(tmp_path / "out", partition="nowhere")
    runs = list(spec.list_runs(sweep(a="ok")))
    with pytest.raises(UserError, match="--launcher=slurm: .*Invalid partition"):
        slurm.submit_runs(executor, runs, tmp_path / "out", sweep(a="ok"))


def test_the_command_runs_a_sweep_on_the_cluster(slurm_conf, tmp_path):
    texts = small.corpus(tmp_path / "texts")
    flags = dict(flag.removeprefix("--config.").split("=", 1) for flag in small.arguments(texts, "x")[2:])
    (tmp_path / "sweep.py").write_text(f"""
from efficientllm.sweep import Sweep
def get_config():
    return Sweep(name="real", baseline="gqa", seeds=(0,), twice=False, equal={{"tokens": 0.0}},
                 variants={{"gqa": "configs/base.py"}}, overrides={flags | {"train.steps": 3}!r})
""")
    argv = [f"--config={tmp_path}/sweep.py", f"--out={tmp_path}/out", "--launcher=slurm", "--partition=debug"]
    done = subprocess.run(
        [sys.executable, "-m", "efficientllm.sweep", *argv], cwd=small.ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = (tmp_path / "out").glob("*/record.json")
    assert json.loads(row.read_text())["outcome"] == "ok"
    assert (tmp_path / "out" / "report" / "index.html").exists()
