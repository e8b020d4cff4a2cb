"""Times of repeated work: the first calls set aside until the times have settled, statistics of the rest."""

import contextlib
import statistics
import time

from efficientllm.metrics.reading import Reading, missing

CAP = 20  # calls that are set aside at most
TAIL = 10  # a percentile is given where at least this many samples lie beyond it: p99 from 1000 samples on


class StepTimer:
    """Wall time of each call, in s, every call blocked on by the caller (a latency; throughput is another number).

        with timer.step():
            state = jax.block_until_ready(train_step(state, batch))

    Calls go to `discarded` until the last `window` of them vary by less than `settled` (standard deviation over mean)
    or `cap` have been made; from then on to `samples`. A relative rule, so that it means the same for every size of
    step. `warming` tells whether the next call is still set aside, `settled` is False where the cap ended the warm-up.
    """

    def __init__(self, window=5, settled=0.02, cap=CAP, clock=time.perf_counter):
        self._window, self._threshold, self._cap, self._clock = window, settled, cap, clock
        self._running = False
        self.warming = cap > 0
        self.settled = False
        self.discarded, self.samples = [], []

    @contextlib.contextmanager
    def step(self):
        """Times one call. Raises RuntimeError inside another: two generations in one timer are one wrong number."""
        if self._running:
            raise RuntimeError("a step is being timed already: one call, one step")
        self._running = True
        begin = self._clock()
        try:
            yield
            self.add(self._clock() - begin)
        finally:
            self._running = False

    def add(self, seconds):
        """Adds a time measured elsewhere."""
        if not self.warming:
            self.samples.append(seconds)
            return
        self.discarded.append(seconds)
        last = self.discarded[-self._window :]
        self.settled = len(last) == self._window and variation(last) < self._threshold
        self.warming = not self.settled and len(self.discarded) < self._cap

    def statistics(self):
        """`summary` of `samples`, with their `count`, the `discarded_s` list and whether the warm-up `settled`."""
        return {
            **summary(self.samples),
            "count": len(self.samples),
            "discarded_s": list(self.discarded),
            "settled": self.settled,
        }


def variation(samples):
    """Standard deviation over mean; infinite for fewer than two samples."""
    return statistics.stdev(samples) / statistics.fmean(samples) if len(samples) > 1 else float("inf")


def summary(samples, unit="s", source="wall clock"):
    """Mean, median and percentiles of `samples` as Readings, null where there are too few samples to say."""
    if not samples:
        none = missing(unit, "no samples")
        return dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), none)
    ordered = sorted(samples)
    tails = {f"p{percent}": _percentile(ordered, percent, unit, source) for percent in (90, 95, 99)}
    mean, median = statistics.fmean(ordered), statistics.median(ordered)
    return {"mean": Reading(mean, unit, source), "p50": Reading(median, unit, source), **tails}


def _percentile(ordered, percent, unit, source):
    needed = TAIL * 100 // (100 - percent)
    if len(ordered) < needed:
        return missing(unit, f"needs {needed} samples, has {len(ordered)}")
    rank = -(-percent * len(ordered) // 100)  # nearest rank: a time that did occur
    return Reading(ordered[rank - 1], unit, source)
