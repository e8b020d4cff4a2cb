"""Time in which this process did not run at all: stopped by a signal, frozen with its container, or suspended."""

import threading
import time

from efficientllm.metrics import counters, host

BEAT_S = 0.1  # between two looks at the clocks
LATE_S = 0.5  # a look that comes later than this, without CPU time meanwhile, was kept from happening
SNAPSHOT_S = 5.0  # between two looks at how long each thread waited for a core: a file a thread, a millisecond in all


class Pulse:
    """Sums up pauses. Two `beat()` of any threads with more than LATE_S between them are a pause if the process took
    little CPU time meanwhile: a process that waits for its device goes on beating, one that is stopped cannot. What its
    threads waited for a core is no pause: others had the machine, which `conditions` says.

    A suspended machine stops the monotonic clock as well: that time shows between CLOCK_BOOTTIME and CLOCK_MONOTONIC.
    """

    def __init__(self, clock=time.monotonic, cpu=host.cpu_seconds, suspended=None, delays=counters.run_delays):
        self._clock, self._cpu, self._suspended, self._delays = clock, cpu, suspended or suspended_s, delays
        self._lock = threading.Lock()
        self._last = self._look()
        self._waited = self._last[0], self._delays() or {}
        self.stopped_s = 0.0

    def beat(self):
        """Takes note of the time since the last beat; returns the stopped time in s so far."""
        with self._lock:
            (then, cpu_then, away_then), self._last = self._last, self._look()
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
        """How long the thread that waited longest for a core has done so since the last snapshot."""
        (_, before), after = self._waited, self._delays() or {}
        self._waited = now, after
        return max((delay - before.get(thread, 0.0) for thread, delay in after.items()), default=0.0)

    def _look(self):
        return self._clock(), self._cpu(), self._suspended()


def suspended_s():
    """Time since boot that the machine has slept; 0 where the system has no such clock."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
