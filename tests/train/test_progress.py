"""Progress lines and time left."""

import logging

import pytest

from efficientllm.runtime.log import Countdown, clock_time
from efficientllm.train.progress import Progress

pytestmark = pytest.mark.quick


def test_progress_line_has_step_loss_rate_and_time_left():
    now = iter([0.0, 2.0, 4.0])
    progress = Progress(100, clock=lambda: next(now))
    progress.add(1000)
    assert progress.line(1, 5.0) == "step   1/100  loss 5.0000"
    progress.add(1000)
    progress.add(1000)
    assert progress.line(3, 4.5) == "step   3/100  loss 4.5000  500 tokens/s  3:14 left"
    assert clock_time(3723) == "1:02:03"


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
