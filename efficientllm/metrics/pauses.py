"""Detection of pauses: time in which this process was stopped by a signal, frozen with its container, or suspended."""

import threading
import time
from collections.abc import Callable

from efficientllm.metrics import cpu_counters, host

BEAT_S = 0.1  # between two readings of the clocks
LATE_S = 0.5  # a beat that is later than this, without CPU time meanwhile, means that the process was stopped
SNAPSHOT_S = 5.0  # between two readings of the run-queue delays: one file a thread, about a millisecond in all


class PauseDetector:
    """Sums up pauses, from regular calls of `beat()` by any thread.

    More than LATE_S between two beats is a pause if the process took little CPU time meanwhile: a process that waits
    for its device goes on beating, a stopped process cannot. Time that threads waited for a core is no pause: other
    programs had the machine, which `conditions` reports. A suspended machine stops the monotonic clock too; that time
    is the difference of CLOCK_BOOTTIME and CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = host.cpu_seconds,
        suspended: Callable[[], float] | None = None,
        delays: Callable[[], dict[str, float] | None] = cpu_counters.run_delays,
    ):
        self._clock, self._cpu, self._suspended, self._delays = clock, cpu, suspended or suspended_s, delays
        self._lock = threading.Lock()
        self._last = self._read_clocks()
        self._waited = self._last[0], self._delays() or {}
        self.stopped_s = 0.0

    def beat(self) -> float:
        """Adds a pause since the last beat, if there was one; returns the total stopped time in s."""
        with self._lock:
            (then, cpu_then, away_then), self._last = self._last, self._read_clocks()
            now, cpu, away = self._last
            late = now - then - BEAT_S
            if late > LATE_S and cpu - cpu_then < late / 2:
                late -= self._waited_s(now)
                self.stopped_s += late if late > LATE_S else 0.0
            if now - self._waited[0] > SNAPSHOT_S:
                self._waited = now, self._delays() or {}
            if away - away_then > LATE_S:
                self.stopped_s += away - away_then
            return self.stopped_s

    def _waited_s(self, now):
        """Longest run-queue delay of any thread since the last snapshot."""
        (_, before), after = self._waited, self._delays() or {}
        self._waited = now, after
        return max((delay - before.get(thread, 0.0) for thread, delay in after.items()), default=0.0)

    def _read_clocks(self):
        return self._clock(), self._cpu(), self._suspended()


def suspended_s() -> float:
    """Time in s that the machine has been suspended since boot; 0 where the system has no such clock."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
