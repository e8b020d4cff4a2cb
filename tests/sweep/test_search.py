"""Searches for what still fits: how they walk, what they keep, and that they go on."""

import dataclasses
import json

import pytest

import runs
from efficientllm.errors import UserError
from efficientllm.record import row
from efficientllm.sweep import Sweep, cost_estimates, execute, search
from efficientllm.sweep import __main__ as command


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13, 100, 1000, 4096])
@pytest.mark.parametrize("least", [1, 8])
def test_the_limit_is_found_to_a_sixteenth_in_few_tries(limit, least):
    tried = []

    def outcome(value):
        tried.append(value)
        return "ok" if value <= limit * least else "oom"

    largest, bounded = search.find_largest(outcome, least, 4096 * least)
    assert largest % least == 0 and largest <= limit * least
    assert limit * least - largest <= max(least - 1, largest / search.RESOLUTION)
    assert bounded == (None if limit == 4096 else "oom")
    assert len(tried) == len(set(tried)) <= 18


def test_nothing_runs_and_everything_runs():
    assert search.find_largest(lambda value: "oom", 4, 64) == (None, "oom")
    assert search.find_largest(lambda value: "ok", 4, 67) == (64, None)
    assert search.find_largest(lambda value: "nan" if value < 8 else "invalid", 1, 64) == (7, "invalid")


SWEEP = Sweep(
    name="fits",
    baseline="a",
    variants={"a": "configs/base.py", "b": ("configs/base.py", {"model.mixer": "mqa"})},
    seeds=(3,),
    search=("train.length", 64, 1024),
    memory_gb=2.0,
)


def run_up_to(limits, calls):
    def run(probe, folder, timeout_s, memory_bytes):
        (length,) = (int(flag.partition("=")[2]) for flag in probe.argv if flag.startswith("--config.train.length="))
        assert "--config.seed=3" in probe.argv and memory_bytes == 2e9
        calls.append((probe.variant, length))
        record = row.build_record(
            outcome="ok" if length <= limits[probe.variant] else "oom",
            name="x",
            task="pretrain",
            config={},
            provenance={},
        )
        folder.mkdir(parents=True)
        row.write_record(record | {"sweep": probe.place}, folder / "record.json")
        return record["outcome"]

    return run


def test_every_try_is_a_row_and_none_is_made_twice(tmp_path, capsys):
    calls = []
    limits = {"a": 700, "b": 5000}
    result = search.search_all(SWEEP, tmp_path, run=run_up_to(limits, calls))
    assert (result["a"].largest, result["a"].bounded) == (640, "oom") and result["b"].largest == 1024
    assert len(list(tmp_path.glob("*/record.json"))) == len(calls)
    assert json.loads((tmp_path / "search.json").read_text())["variants"]["a"]["tries"][-1] == [704, "oom"]
    again = []
    assert search.search_all(SWEEP, tmp_path, run=run_up_to(limits, again)) == result and not again
    text = search.format_results(SWEEP, result)
    assert "640  oom" in text and "the largest asked for, 1,024" in text


def test_a_retried_outcome_runs_again(tmp_path, capsys):
    search.search_all(SWEEP, tmp_path, run=run_up_to({"a": 64, "b": 64}, []))
    calls = []

    def run(probe, folder, *limits):
        calls.append(probe.variant)
        return "ok"

    result = search.search_all(SWEEP, tmp_path, retry=("oom",), run=run)
    assert calls and result["a"].largest == 1024


def test_an_interrupted_search_says_nothing(tmp_path, capsys):
    assert search.search_all(SWEEP, tmp_path, run=lambda *_: "interrupted") is None
    assert not (tmp_path / "search.json").exists()


def test_the_command_searches_here_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search.search_all, "__defaults__", (*search.search_all.__defaults__[:-1], lambda *_: "ok"))
    assert command._search(SWEEP, {}, (), tmp_path, ()) == 0
    assert "1,024" in capsys.readouterr().out
    with pytest.raises(UserError, match="one run after another"):
        command._search(SWEEP, {"launcher": "slurm"}, (), tmp_path, ())
    assert execute.read_outcome(tmp_path) is None


def test_a_value_that_no_run_could_have_is_refused_before_any(monkeypatch):
    monkeypatch.setattr(cost_estimates, "_cost", lambda argv: pytest.fail("a model is described"))
    monkeypatch.chdir(runs.ROOT)
    for changes, message in (
        ({"search": ("train.batch_size", 1, 2**40)}, "config.train.batch_size = 1099511627776: must be"),
        ({"search": (), "grid": ("train.lr", (1e-3, 1e-4))}, "the peak of config.train.schedule"),
        ({"search": (), "grid": ("train.schedule", ("cosin(peak=1)", "constant(peak=1.0)"))}, "did you mean 'cosine'?"),
        ({"search": (), "overrides": {"seed": -1}}, "config.seed = -1"),
    ):
        with pytest.raises(UserError) as error:
            cost_estimates.estimate_costs(dataclasses.replace(SWEEP, **changes))
        assert message in str(error.value) and "variant a: " in str(error.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config"], "--config needs a value"),
        (["--config=x", "--out"], "--out needs a value"),
        (["--config=x", f"--out={'y' * 300}"], "--out = "),
        (["--config=x", "--dry_run=false"], "--dry_run=false: is a switch"),
        (["--config=x", "--launcher=loca"], "did you mean 'local'?"),
        (["--config=x", "--retry=okk"], "--retry=okk"),
        (["--config=/dev/zero"], "no such file"),
    ],
)
def test_flags_are_read_before_anything_else(flags, message, capsys):
    assert command.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
