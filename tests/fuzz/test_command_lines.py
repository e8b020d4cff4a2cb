"""Random command lines end in a run or in one line: never in a traceback, never without an end."""

import itertools
import time

import pytest

from fuzz import command_lines, drawn

BASE = ["--config=base"]
SEED = 20250


def _failures(lines, seconds):
    outcomes = ((line, *command_lines.outcome(command_lines.parsed, [*BASE, *line], seconds)) for line in lines)
    return [(line, kind, printed[-500:]) for line, kind, printed in outcomes if kind not in ("ok", "line")]


def test_a_command_line_is_read_or_refused_in_one_line():
    lines = drawn.lines(SEED, *command_lines.fields_and_keys())
    assert _failures(itertools.islice(lines, 300), 5.0) == []


@pytest.mark.slow  # half of --fuzz-seconds, or a minute
def test_many_command_lines_are_read_or_refused_in_one_line(fuzz_seconds):
    end = time.monotonic() + (fuzz_seconds or 60) / 2
    lines = drawn.lines(time.time_ns(), *command_lines.fields_and_keys())
    while time.monotonic() < end:
        assert _failures(itertools.islice(lines, 100), 5.0) == []


@pytest.mark.slow  # what is read is described, or run for two steps, in processes of their own
@pytest.mark.parametrize("mode, each_s", [("describe", 3), ("run", 20)])
def test_what_is_read_ends_in_one_line_or_well(fuzz_seconds, mode, each_s):
    outcomes = command_lines.survey(int(max(60, fuzz_seconds / 2) / each_s), SEED, mode, 60.0)
    assert [entry for entry in outcomes if entry["outcome"] in ("traceback", "hang", "died")] == []


def test_each_outcome_is_told_apart():
    def raises(argv):
        raise ValueError("x")

    def wait(argv):
        time.sleep(60)

    def print_and_return(argv):
        import sys

        print(argv[0], file=sys.stderr)
        return 2

    outcome = command_lines.outcome
    assert outcome(raises, [], 5.0)[0] == "traceback" and outcome(wait, [], 0.05)[0] == "hang"
    assert outcome(print_and_return, ["efficientllm: no"], 5.0)[0] == "line"
    assert outcome(print_and_return, ["Traceback"], 5.0)[0] == "traceback"
    assert outcome(lambda argv: 0, [], 5.0)[0] == "ok" and outcome(lambda argv: 3, [], 5.0)[0] == "status"
