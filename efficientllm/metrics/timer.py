"""Step times: warm-up calls are discarded until the times settle; mean and percentiles of the rest."""

import contextlib
import statistics
import time
import typing
from collections.abc import Callable, Iterator, Sequence

from efficientllm.metrics.reading import Reading, missing

CAP = 20  # warm-up calls at most
TAIL = 10  # a percentile needs at least this many samples beyond it: p99 needs 1000 samples


class StepTimer:
    """Wall time of each call in s. The caller blocks on every call: this is a latency, not a throughput.

        with timer.step():
            state = jax.block_until_ready(train_step(state, batch))

    Calls go to `discarded` until the last `window` of them vary by less than `settled` (standard deviation over mean)
    or `cap` have been made; from then on to `samples`. The rule is relative, so it means the same for short and long
    steps. `warming`: the next call is still discarded. `settled`: False if the cap ended the warm-up.
    """

    def __init__(
        self, window: int = 5, settled: float = 0.02, cap: int = CAP, clock: Callable[[], float] = time.perf_counter
    ):
        self._window, self._threshold, self._cap, self._clock = window, settled, cap, clock
        self._running = False
        self.warming = cap > 0
        self.settled = False
        self.discarded: list[float] = []
        self.samples: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times one call. Raises RuntimeError inside another call: the outer time would include the inner."""
        if self._running:
            raise RuntimeError("a step is being timed already: calls of step() cannot be nested")
        self._running = True
        begin = self._clock()
        try:
            yield
            self.add(self._clock() - begin)
        finally:
            self._running = False

    def add(self, seconds: float) -> None:
        """Adds a time measured elsewhere."""
        if not self.warming:
            self.samples.append(seconds)
            return
        self.discarded.append(seconds)
        last = self.discarded[-self._window :]
        self.settled = len(last) == self._window and variation(last) < self._threshold
        self.warming = not self.settled and len(self.discarded) < self._cap

    def statistics(self) -> dict[str, typing.Any]:
        """`summary` of `samples`, with their `count`, the `discarded_s` list and whether the warm-up `settled`."""
        return {
            **summary(self.samples),
            "count": len(self.samples),
            "discarded_s": list(self.discarded),
            "settled": self.settled,
        }


def variation(samples: Sequence[float]) -> float:
    """Standard deviation over mean; infinite for fewer than two samples."""
    return statistics.stdev(samples) / statistics.fmean(samples) if len(samples) > 1 else float("inf")


def summary(samples: Sequence[float], unit: str = "s", source: str = "wall clock") -> dict[str, Reading]:
    """Mean, median and percentiles of `samples` as Readings; null where there are too few samples."""
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
    rank = -(-percent * len(ordered) // 100)  # nearest rank: a time that was measured
    return Reading(ordered[rank - 1], unit, source)
