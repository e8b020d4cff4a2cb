"""Loops over plans: what they keep, and that a signal ends them."""

import os
import signal

import pytest

import runs
from efficientllm.registry.plugins import import_file
from efficientllm.runtime.stopping import stoppable

pytestmark = pytest.mark.quick
plans_file = import_file(runs.ROOT / "experiments" / "plan" / "plans_file.py")
planning = plans_file.planning
PLANS = {name: ("base.py", {"plan.devices": 1}) for name in ("first", "second", "third")}


@pytest.fixture
def begun(monkeypatch):
    """Names of the plans that were begun; the second is stopped by a signal while it is computed."""
    names = []

    @stoppable
    def main(argv):
        names.append(next(word.removeprefix("--config.name=") for word in argv if word.startswith("--config.name=")))
        if len(names) == 2:
            os.kill(os.getpid(), signum)
        return 0

    signum = signal.SIGTERM
    monkeypatch.setattr(planning.main, "main", main)
    return names


def test_a_signal_ends_the_loop_over_plans(begun, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plans.py", f"--out={tmp_path}"])
    file = plans_file.PlansFile(tmp_path / "plans.csv", PLANS, ("plan",), lambda name, record: {}, str)
    with pytest.raises(SystemExit) as stop:
        file.run("Plans.", "nowhere")
    assert stop.value.code == 128 + signal.SIGTERM and begun == ["first", "second"]
    assert file.file.read_text() == "plan\n"  # what was finished before is written


def test_a_signal_ends_the_loop_over_the_studys_plans(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "table", lambda plans, out: None)
    with pytest.raises(SystemExit) as stop:
        planning.plan_all("^attention/0.5b/", tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM and len(begun) == 2


def test_a_signal_between_two_plans_ends_the_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plans.py", f"--out={tmp_path}"])
    monkeypatch.setattr(planning, "make", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    file = plans_file.PlansFile(tmp_path / "plans.csv", PLANS, ("plan",), lambda name, record: {}, str)
    assert file.run("Plans.", "nowhere") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command resumes" in capsys.readouterr().err
