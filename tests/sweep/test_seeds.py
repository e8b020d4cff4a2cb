"""What the seeds of a sweep can tell, from its rows or from what is usual."""

import math

import pytest

from efficientllm.report import statistics
from efficientllm.sweep import Sweep, seeds, spec
from report import made

pytestmark = pytest.mark.quick


def sweep(**changes):
    return Sweep(**{"name": "s", "baseline": "a", "variants": dict.fromkeys("ab", "configs/base.py")} | changes)


def run_all(ours, out, losses):
    """Rows of every run; `losses` is `{variant: a loss for each seed}`."""
    for run in spec.list_runs(ours):
        made.row(out / run.folder, seed=run.seed, sweep=run.place, eval_loss=losses[run.variant][run.seed])


def test_a_spread_is_that_of_the_rows_paired_by_seed(tmp_path):
    ours = sweep()
    runs = list(spec.list_runs(ours))
    logs = (0.01, 0.03, 0.02)
    base = (2.0, 3.0, 4.0)  # what seeds share does not count
    run_all(ours, tmp_path, {"a": base, "b": [loss * math.exp(log) for loss, log in zip(base, logs, strict=True)]})
    spread = seeds.measure_spread(ours, runs, tmp_path)
    assert spread.degrees == 2 and spread.value == pytest.approx(0.01)
    text = seeds.describe_power(ours, runs, tmp_path)
    assert f"3 seeds tell {statistics.smallest_effect(0.01, 3):.2%} " in text
    assert f"1% needs {statistics.blocks_needed(0.01, 0.01)} seeds" in text and "2 degrees of freedom" in text
    assert "varies by 1.00% from seed to seed" in text


def test_without_rows_the_spread_is_said_to_be_the_usual_one(tmp_path):
    ours = sweep(seeds=(0,))
    text = seeds.describe_power(ours, list(spec.list_runs(ours)), tmp_path)
    assert "one seed tells none" in text and "until two seeds of a variant have rows" in text
    made.row(tmp_path / next(spec.list_runs(ours)).folder, outcome="nan", eval_loss=None)
    assert seeds.measure_spread(ours, list(spec.list_runs(ours)), tmp_path) is None
