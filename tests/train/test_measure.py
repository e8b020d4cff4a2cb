"""Measured segments: what stops, logs and pauses have to do with times, on a clock that tests set."""

import types

import pytest

from efficientllm.metrics.energy.window import EnergyReader, EnergyWindow
from efficientllm.train import loop, measure, row
from efficientllm.train.measure import Measurement

pytestmark = pytest.mark.quick


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Metered(EnergyReader):
    source, scope, kind = "test", "gpu", "measured"

    def stop(self):
        self._close(0)
        return EnergyWindow(100.0, 10.0, 1.0, self.source, self.scope, self.kind, 0.0, None)


class StoppedSampler:
    """A sampler that says what a test says."""

    stopped = 0.0

    def mark(self):
        return 0

    def since(self, mark):
        return mark

    def stopped_s(self):
        return self.stopped


def measurement(warm_up=0):
    clock = Clock()
    return Measurement(Metered(None), StoppedSampler(), clock, warm_up), clock


def test_time_of_steps_is_time_of_the_throughput():
    """What happens between the last step and the end of the segment is in neither."""
    measured, clock = measurement()
    measured.start()
    for seconds in (0.5, 0.25, 0.75):
        clock.now += seconds
        measured.step_done(128)
    clock.now += 30.0  # a log, a first chart, a look at the disk
    measured.stop()
    assert measured.seconds == sum(measured.timer.samples) == 1.5
    assert measured.tokens / measured.seconds == pytest.approx(128 / (measured.seconds / measured.steps))


def test_a_step_within_which_the_process_was_stopped_is_left_out_and_its_segment_has_no_energy():
    measured, clock = measurement()
    measured.start()
    for stopped in (0.0, 20.0, 20.0):
        clock.now += 20.0 if stopped > measured._sampler.stopped else 0.5
        measured._sampler.stopped = stopped
        measured.step_done(128)
    measured.stop()
    assert measured.timer.samples == [0.5, 0.5] and (measured.steps, measured.tokens, measured.seconds) == (2, 256, 1.0)
    assert measured.interrupted == 1 and measured.spans[0].stopped_s == 20.0
    assert measured.windows[0].energy_j is None and "stopped for 20.0 s" in measured.windows[0].reason
    measured.start()
    clock.now += 0.5
    measured.step_done(128)
    measured.stop()
    assert measured.windows[1].energy_j == 100.0


def test_steps_beside_a_checkpoint_are_told_from_those_of_the_warm_up():
    measured, clock = measurement(warm_up=1)
    measured.restart_clock()
    for _ in range(3):
        clock.now += 0.5
        measured.step_done(128)
    assert (measured.steps, measured.unwatched, measured.timer.discarded) == (0, 2, [0.5])
    assert "a checkpoint was being written in all of the 2 steps" in row._why_unmeasured(measured)


def test_an_abandoned_segment_leaves_nothing_behind():
    measured, clock = measurement()
    for end in (measured.stop, measured.abandon):
        measured.start()
        clock.now += 0.5
        measured.step_done(128)
        end()
    assert (measured.steps, measured.tokens, measured.seconds, measured.timer.samples) == (1, 128, 0.5, [0.5])


def test_the_segment_ends_before_its_last_step_is_logged():
    measured, clock = measurement()
    config = types.SimpleNamespace(train=types.SimpleNamespace(log_every=1, steps=9))
    seen = []
    hooks = loop.Hooks(lambda *_: seen.append(measured.running), None, None, None)
    running = loop._Loop(config, measured, types.SimpleNamespace(add=lambda tokens: None, unit="tokens"), hooks)
    measured.start()
    for last in (False, True):
        running.pending = (1, {"loss": 1.0, "grad_norm": 1.0, "tokens": 8, "samples": 1})
        running.collect(last)
    assert seen == [True, False]


class FakeReader:
    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")
        return "window"

    def faults(self):
        return []


def test_measurement_counts_steady_steps_inside_segments_only():
    times = iter(range(1000))
    reader, sampler = (
        FakeReader(),
        types.SimpleNamespace(mark=lambda: "mark", since=lambda mark: "averages", stopped_s=float),
    )
    measured = measure.Measurement(reader, sampler, clock=lambda: float(next(times)))
    measured.restart_clock()
    while not measured.steady:
        measured.step_done(10)
    warm = len(measured.timer.discarded)
    assert warm == 5 and measured.tokens == 0
    measured.step_done(10)  # steady, but between segments
    measured.start()
    for _ in range(3):
        measured.step_done(10)
    measured.stop()
    measured.stop()
    assert (measured.tokens, measured.steps, measured.seconds) == (30, 3, 3.0)
    measured.start()
    measured.step_done(10)
    measured.abandon()
    assert (measured.tokens, measured.steps) == (30, 3)
    assert measured.windows == ["window"] and reader.calls == ["start", "stop"] * 2
