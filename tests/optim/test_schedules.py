"""Learning rate schedules."""

import pytest

from efficientllm.registry import build

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", ["cosine(peak=2.0, warmup=0.1, final=0.1)", "linear(peak=2.0, warmup=0.1, final=0.1)"])
def test_schedules_warm_up_to_the_peak_and_end_at_the_final_share(name):
    lr = build("schedule", name, steps=100)
    assert lr(0) == 0 and lr(5) == pytest.approx(1.0) and lr(10) == pytest.approx(2.0)
    assert lr(100) == pytest.approx(0.2) and lr(40) > lr(60)
    assert build("schedule", "constant(peak=2.0)", steps=100)(100) == 2.0


@pytest.mark.parametrize(
    "spec", ["cosine(peak=1.0, warmup={})", "linear(peak=1.0, warmup={})", "constant(peak=1.0, warmup={})"]
)
@pytest.mark.parametrize("warmup, steps", [(0.99, 10), (0.6, 1), (0.01, 3), (0.0, 1)])
def test_a_schedule_reaches_its_peak_within_its_steps(spec, warmup, steps):
    rates = [float(build("schedule", spec.format(warmup), steps=steps)(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(1.0) and min(rates) >= 0
