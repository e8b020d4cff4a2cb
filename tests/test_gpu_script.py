"""experiments/gpu/run.sh: sweeps in order of value, within its seconds, and its exit status."""

import os
import pathlib
import subprocess

import pytest

import runs
from efficientllm.registry.plugins import import_file

pytestmark = pytest.mark.quick
SCRIPT = runs.ROOT / "experiments/gpu/run.sh"
STUDIES = ("train_05b", "infer_15b", "train_15b", "mixers_05b")


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the script with a `python` that notes its arguments and ends with the status in the file `status`."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nsleep $(cat {tmp_path}/sleep)\nexit $(cat {tmp_path}/status)\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")

    def run(*arguments, status=0, sleep=0):
        (tmp_path / "status").write_text(str(status))
        (tmp_path / "sleep").write_text(str(sleep))
        (tmp_path / "calls").unlink(missing_ok=True)
        command = ["bash", SCRIPT, f"--rows={tmp_path}/rows", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        calls = tmp_path / "calls"
        return ended, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_it_runs_the_studies_in_order(call):
    ended, calls = call()
    assert ended.returncode == 0
    configs = [pathlib.PurePath(line.split("--config=")[1].split()[0]).name for line in calls]
    assert configs == [f"sweep.py:{study}" for study in STUDIES]
    assert all("-m efficientllm.sweep" in line and "--config.task" not in line for line in calls)


def test_it_plans(call):
    _, calls = call("--plan=h100", "--only=train_05b infer_15b")
    assert all("--config.task=plan --config.plan.hardware=h100" in line for line in calls)
    assert ["--config.plan.of=infer" in line for line in calls] == [False, True]
    assert "h100-infer_15b.rows.jsonl" in calls[1]


def test_a_failed_run_does_not_stop_it_and_bad_input_does(call):
    ended, calls = call(status=1)
    assert ended.returncode == 1 and len(calls) == len(STUDIES)
    ended, calls = call(status=2)
    assert ended.returncode == 2 and len(calls) == 1


def test_it_ends_when_its_seconds_are_over(call):
    ended, calls = call("--seconds=1", sleep=20)
    assert ended.returncode == 130 and len(calls) == 1


@pytest.mark.parametrize("argument", ["--steps=3", "--seconds=soon", "--seconds="])
def test_bad_input(call, argument):
    ended, calls = call(argument)
    assert ended.returncode == 2 and not calls
    assert argument in ended.stderr and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_a_sweep(study):
    sweep = import_file(runs.ROOT / "experiments/gpu/sweep.py").get_config(study)
    assert sweep.name == f"gpu_{study}" and sweep.baseline in sweep.variants
