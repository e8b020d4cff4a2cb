"""Races have known orders, results and intervals."""

import functools
import operator
import os
import signal
import statistics

import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.metrics import race

pytestmark = pytest.mark.quick

pytestmark = pytest.mark.quick


def contestants(calls, names="abc"):
    """Contestants that note their calls, as (name, block), and return ten times the block."""

    def contestant(name, block):
        calls.append((name, block))
        return 10 * block

    return {name: functools.partial(contestant, name) for name in names}


def test_discarded_blocks_are_run_and_not_counted():
    calls = []
    results = race.race(contestants(calls), blocks=3, discarded=2)
    assert results == dict.fromkeys("abc", [20, 30, 40])
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [[(name, b) for name in "abc"] for b in range(5)]


def test_the_order_is_another_in_each_block_and_the_seed_s():
    orders = []
    for seed in (0, 0, 1):
        calls = []
        race.race(contestants(calls), blocks=20, discarded=0, seed=seed)
        orders.append(calls)
    assert orders[0] == orders[1] != orders[2]
    firsts = [name for name, _ in orders[0][::3]]
    assert set(firsts) == set("abc")


def test_results_keep_the_contestants_order():
    assert list(race.race(contestants([]), blocks=4)) == ["a", "b", "c"]


def test_every_block_is_told_discarded_ones_too():
    told = []
    race.race(contestants([], "ab"), blocks=1, discarded=1, after_block=lambda *arguments: told.append(arguments))
    assert told == [(0, {"a": 0, "b": 0}), (1, {"a": 10, "b": 10})]


def test_progress_counts_all_blocks(capsys):
    race.race(contestants([]), blocks=1, after_block=race.print_progress(1, label="here: "))
    assert capsys.readouterr().err.splitlines() == [f"here: block {i} of 3" for i in (1, 2, 3)]


def test_an_exception_of_one_contestant_ends_the_race_and_names_it():
    calls = []

    def fails(block):
        if block == 1:
            raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError, match="no") as caught:
        race.race(contestants(calls) | {"bad": fails}, blocks=5)
    assert caught.value.__notes__ == ["bad in block 1 of the race"]
    assert max(block for _, block in calls) <= 1


@pytest.mark.parametrize("blocks", [0, -1])
def test_a_race_without_a_counted_block_is_refused(blocks):
    with pytest.raises(UserError, match=f"blocks = {blocks}: "):
        race.race(contestants([]), blocks)


def test_calls_are_timed_by_the_wall_and_by_the_cpu(monkeypatch):
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(race.time, "process_time", lambda: clock["cpu"])

    def work(wall, cpu):
        clock["wall"] += wall
        clock["cpu"] += cpu

    calls = {"one": functools.partial(work, 1.0, 2.0), "other": functools.partial(work, 4.0, 0.5)}
    wall, cpu = race.race_calls(calls, blocks=2, seed=3)
    assert wall == {"one": [1.0, 1.0], "other": [4.0, 4.0]} and cpu == {"one": [2.0, 2.0], "other": [0.5, 0.5]}


def test_columns_split_tuples():
    assert race.columns({"a": [(1, "x"), (2, "y")], "b": [(3, "z"), (4, "w")]}) == [
        {"a": [1, 2], "b": [3, 4]},
        {"a": ["x", "y"], "b": ["z", "w"]},
    ]


def test_a_ratio_is_of_medians():
    ratio = race.ratio_of_medians([2.0, 4.0, 90.0], [1.0, 8.0, 2.0])
    assert ratio.ratio == statistics.median([2.0, 4.0, 90.0]) / statistics.median([1.0, 8.0, 2.0])
    assert ratio.low <= ratio.ratio <= ratio.high


def test_equal_ratios_in_every_block_leave_an_interval_of_no_width():
    b = [1.0, 5.0, 2.0, 9.0, 4.0]
    assert race.ratio_of_medians([3 * value for value in b], b) == pytest.approx((3.0, 3.0, 3.0))
    assert str(race.ratio_of_medians([3.0], [2.0])) == "1.50 (1.50-1.50)"


def test_a_ratio_is_the_same_at_every_call_and_of_equal_lists_only():
    a, b = np.random.default_rng(0).lognormal(0, 0.2, (2, 12))
    assert race.ratio_of_medians(a, b) == race.ratio_of_medians(a, b)
    assert race.ratio_of_medians(a, b) != race.ratio_of_medians(a, b, seed=1)
    with pytest.raises(ValueError, match="inhomogeneous"):
        race.ratio_of_medians([1.0, 2.0], [1.0])


def test_the_interval_is_the_bootstrap_s_by_another_way():
    a, b = np.random.default_rng(1).lognormal(0, 0.2, (2, 9))
    rows = np.random.default_rng(2).integers(0, 9, (4000, 9))
    ratios = sorted(statistics.median(a[row]) / statistics.median(b[row]) for row in rows)
    ratio = race.ratio_of_medians(a, b)
    assert ratio.low == pytest.approx(ratios[100], rel=0.03) and ratio.high == pytest.approx(ratios[3900], rel=0.03)


@pytest.mark.parametrize("blocks", [5, 11, 30])
def test_the_interval_covers(blocks):
    rng, covered, trials = np.random.default_rng(blocks), 0, 300
    for _ in range(trials):
        drift = rng.lognormal(0, 0.3, blocks)  # of the machine: the same for both
        a, b = drift * 1.5 * rng.lognormal(0, 0.1, blocks), drift * rng.lognormal(0, 0.1, blocks)
        ratio = race.ratio_of_medians(a, b, draws=1000)
        covered += ratio.low <= 1.5 <= ratio.high
    # 300 trials at 0.95 have a standard error of 0.013. Medians of few blocks take few values: intervals err wide.
    assert covered / trials >= 0.92


def test_pairs_narrow_the_interval_where_both_drift_together():
    rng = np.random.default_rng(4)
    drift = rng.lognormal(0, 0.3, 20)
    a, b = drift * rng.lognormal(0, 0.02, 20), drift * rng.lognormal(0, 0.02, 20)
    paired, shuffled = race.ratio_of_medians(a, b), race.ratio_of_medians(a, rng.permutation(b))
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_a_process_answers_and_ends():
    process = race.Process(functools.partial, operator.add, 2)
    assert [process.ask(3), process.ask(40)] == [5, 42]
    process.close()
    assert process._process.exitcode == 0


def test_a_process_has_its_own_environment():
    process = race.Process(functools.partial, os.getenv, environment={"OF_THE_RACE": "1"})
    try:
        assert process.ask("OF_THE_RACE") == "1" and "OF_THE_RACE" not in os.environ
    finally:
        process.close()


def test_a_process_that_fails_is_told(capfd):
    process = race.Process(functools.partial, operator.truediv, 1)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        process.ask(0)
    process.close()
    assert "ZeroDivisionError" in capfd.readouterr().err


def _die_of(number):
    os.kill(os.getpid(), number)


def test_a_race_says_which_contestant_died_of_what():
    process = race.Process(functools.partial, _die_of)
    with pytest.raises(UserError, match="peer: its process was ended by SIGILL .*instructions that this machine"):
        race.race({"peer": lambda _: process.ask(signal.SIGILL)}, blocks=1)
    process.close()
