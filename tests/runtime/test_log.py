"""Time left of long work, and clock times."""

import logging

import pytest

from efficientllm.runtime.log import Countdown, clock_time

pytestmark = pytest.mark.quick


def test_a_clock_time_has_hours_where_there_are_any():
    assert (clock_time(3723), clock_time(123)) == ("1:02:03", "2:03")


def test_a_countdown_speaks_at_most_every_few_seconds(caplog, monkeypatch):
    log = logging.getLogger("efficientllm")
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # those that earlier tests' runs opened
    log.setLevel(logging.INFO)
    now = iter((0, 4, 8, 16, 17, 40))
    countdown = Countdown("measuring", 10, every_s=5, clock=lambda: next(now))
    for _ in range(4):
        countdown.add(2)
    countdown.add(2)
    assert caplog.messages == ["measuring: 40%, 0:12 left", "measuring: 60%, 0:11 left"]
