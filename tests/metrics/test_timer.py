import pytest

from efficientllm.metrics.timer import StepTimer, summary, variation

pytestmark = pytest.mark.quick


class Script:
    """A clock by which the steps take the given times."""

    def __init__(self, times):
        self.now, self.times, self.inside = 0.0, iter(times), False

    def __call__(self):
        if self.inside:
            self.now += next(self.times)
        self.inside = not self.inside
        return self.now


def run(times, **options):
    timer = StepTimer(clock=Script(times), **options)
    for _ in times:
        with timer.step():
            pass
    return timer


def test_first_calls_are_set_aside_until_times_settle():
    timer = run([9.0, 3.0, 1.5, 1.01, 1.0, 1.0, 1.0, 1.0, 1.2])
    assert timer.discarded == pytest.approx([9.0, 3.0, 1.5, 1.01, 1.0, 1.0, 1.0, 1.0])
    assert timer.samples == pytest.approx([1.2])
    assert timer.settled and not timer.warming


def test_warm_up_ends_at_the_cap_and_says_that_it_did_not_settle():
    timer = run([1.0, 2.0] * 10, cap=6)
    assert len(timer.discarded) == 6 and len(timer.samples) == 14
    assert timer.settled is False
    assert timer.statistics()["settled"] is False and timer.statistics()["count"] == 14
    assert timer.statistics()["discarded_s"] == pytest.approx([1.0, 2.0] * 3)


def test_the_rule_is_relative_and_so_the_same_at_every_scale():
    times = [5.0, 1.03, 1.0, 1.01, 1.0, 1.0, 1.0]
    counts = [len(run([scale * seconds for seconds in times]).discarded) for scale in (1e-5, 1.0, 1e4)]
    assert counts == [6, 6, 6]


def test_no_warm_up_with_a_cap_of_zero():
    assert run([1.0, 2.0], cap=0).samples == pytest.approx([1.0, 2.0])


def test_two_generations_do_not_fit_into_one_timer():
    timer = StepTimer()
    with timer.step(), pytest.raises(RuntimeError, match="cannot be nested"), timer.step():
        pass
    assert len(timer.discarded) == 1


def test_a_call_that_fails_is_no_sample():
    timer = StepTimer()
    with pytest.raises(ZeroDivisionError), timer.step():
        _ = 1 / 0
    with timer.step():
        pass
    assert len(timer.discarded) == 1


def test_percentiles_only_where_samples_allow():
    few = summary([1.0, 3.0])
    assert few["mean"].value == 2.0 and few["p50"].value == 2.0
    assert few["p90"].value is None and few["p90"].reason == "needs 100 samples, has 2"
    thousand = summary([float(i) for i in range(1, 1001)])
    assert [thousand[key].value for key in ("p50", "p90", "p95", "p99")] == [500.5, 900.0, 950.0, 990.0]
    almost = summary([1.0] * 999)
    assert almost["p99"].value is None and almost["p95"].value == 1.0


def test_no_samples_are_null_and_not_zero():
    assert all(reading.value is None for reading in summary([]).values())


def test_variation():
    assert variation([1.0]) == float("inf")
    assert variation([9.0, 11.0]) == pytest.approx(2**0.5 / 10)
