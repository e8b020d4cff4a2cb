"""Progress lines and time left."""

import pytest

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
