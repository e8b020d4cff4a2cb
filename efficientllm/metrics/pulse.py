"""Time in which this process did not run at all: stopped by a signal, frozen with its container, or suspended."""

import threading
import time

from efficientllm.metrics import host

BEAT_S = 0.1  # between two looks at the clocks
LATE_S = 0.5  # a look that comes later than this, without CPU time meanwhile, was kept from happening


class Pulse:
    """Sums up pauses. Two `beat()` of any threads with more than LATE_S between them are a pause if the process took
    little CPU time meanwhile: a process that waits for its device goes on beating, one that is stopped cannot.

    A suspended machine stops the monotonic clock as well: that time shows between CLOCK_BOOTTIME and CLOCK_MONOTONIC.
    """

    def __init__(self, clock=time.monotonic, cpu=host.cpu_seconds, suspended=None):
        self._clock, self._cpu, self._suspended = clock, cpu, suspended or suspended_s
        self._lock = threading.Lock()
        self._last = self._look()
        self.stopped_s = 0.0

    def beat(self):
        """Takes note of the time since the last beat; returns the stopped time in s so far."""
        with self._lock:
            (then, cpu_then, away_then), self._last = self._last, self._look()
            now, cpu, away = self._last
            late = now - then - BEAT_S
            if late > LATE_S and cpu - cpu_then < late / 2:
                self.stopped_s += late
            if away - away_then > LATE_S:
                self.stopped_s += away - away_then
            return self.stopped_s

    def _look(self):
        return self._clock(), self._cpu(), self._suspended()


def suspended_s():
    """Time since boot that the machine has slept; 0 where the system has no such clock."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
