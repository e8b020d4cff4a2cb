"""A thread that samples power, memory and utilisation all through a run, and their averages over any part of it."""

import dataclasses
import threading
import time

from efficientllm.metrics import host, memory
from efficientllm.metrics.pulse import BEAT_S, Pulse


@dataclasses.dataclass(frozen=True)
class Averages:
    """Time-weighted means over one stretch of a run; None where nothing could be read.

    memory_bytes:    per device (on a CPU: of this process); `memory_source` says what counted.
    memory_fraction: of the device's memory (on a CPU: the machine's), 0..1.
    utilisation:     mean over devices, 0..1; `utilisation_source` says what counted.
    power_w:         all devices together.
    device_clock_mhz, power_capped: mean over devices; the share of the samples at which a power limit held them down.
    stopped_s:       how long the process did not run at all; no part of `duration_s` or of any mean.
    """

    duration_s: float
    memory_bytes: float | None
    memory_fraction: float | None
    memory_source: str
    utilisation: float | None
    utilisation_source: str
    host_memory_bytes: float | None
    power_w: float | None
    device_clock_mhz: float | None = None
    power_capped: float | None = None
    stopped_s: float = 0.0


MEANS = (
    "memory_bytes",
    "memory_fraction",
    "utilisation",
    "host_memory_bytes",
    "power_w",
    "device_clock_mhz",
    "power_capped",
)


def combine(parts):
    """Averages of several stretches of one run as one, weighted by their durations."""
    if not parts:
        return Averages(0.0, None, None, "nothing was sampled", None, "nothing was sampled", None, None)
    means = {}
    for key in MEANS:
        known = [(getattr(part, key), part.duration_s) for part in parts if getattr(part, key) is not None]
        means[key] = _ratio(sum(value * seconds for value, seconds in known), sum(seconds for _, seconds in known))
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("duration_s", "stopped_s")}
    return dataclasses.replace(parts[0], **sums, **means)


@dataclasses.dataclass
class _Integral:
    """Integral over time of one sampled quantity by the trapezoid rule, over the time in which it was readable."""

    area: float = 0.0
    seconds: float = 0.0
    last: tuple | None = None

    def add(self, now, value):
        if value is not None and self.last is not None:
            self.area += (now - self.last[0]) * (value + self.last[1]) / 2
            self.seconds += now - self.last[0]
        self.last = None if value is None else (now, value)


class Sampler:
    """Samples every `interval_s` seconds from `start()` to `stop()`, or for the length of a `with` block.

        begin = sampler.mark()
        ...
        averages = sampler.since(begin)

    `cost_fraction` is the CPU time of the thread over the time it has run: what sampling takes from one core.
    An error in the thread is raised by the next call of `mark`, `since` or `stop`.
    """

    def __init__(self, devices, reader, interval_s=0.1, clock=time.monotonic):
        self._devices, self._reader, self._interval_s, self._clock = devices, reader, interval_s, clock
        self._on_host = devices[0].platform == "cpu"
        self._use_pool = not self._on_host and (memory.preallocates(devices) or reader.memory_total_bytes() is None)
        names = ("memory", "host_memory", "utilisation", "power", "clock", "capped")
        self._integrals = {name: _Integral() for name in names}
        self._latest = {}
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._thread, self._error, self._pulse, self._stopped_s = None, None, None, 0.0
        self.cost_fraction = 0.0
        self._cpu_at = (self._clock(), host.cpu_seconds())

    def start(self):
        """Starts the thread."""
        self._pulse = Pulse()
        self._thread = threading.Thread(target=self._run, name="metrics-sampler", daemon=True)
        self._thread.start()
        return self

    def stop(self):
        """Ends the thread and waits for it. May be called more than once."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._raise_error()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def stopped_s(self):
        """How long the process has not run at all since `start()`, in s; see `pulse`."""
        return self._pulse.beat() if self._pulse else 0.0

    def latest(self):
        """The last sample as scalars for a chart, `{"power_w": ..., "memory_gb": ...}`, without the unreadable."""
        return {key: value for key, value in self._latest.items() if value is not None}

    def mark(self):
        """A point in time, to hand to `since`."""
        self._raise_error()
        with self._lock:
            now = self._sample()
            sums = {key: (each.area, each.seconds) for key, each in self._integrals.items()}
        return now, host.cpu_seconds(), sums, self._stopped_s

    def since(self, mark):
        """Averages from `mark` until now."""
        begin, cpu_begin, before, stopped_before = mark
        end, cpu_end, after, stopped = self.mark()
        mean = {key: _mean(before[key], after[key]) for key in after}
        stopped -= stopped_before
        seconds = max(0.0, end - begin - stopped)
        if self._on_host:  # counters at both edges: exact, where samples would only come close
            mean["utilisation"] = _ratio(cpu_end - cpu_begin, seconds * host.usable_cores())
        return Averages(
            duration_s=seconds,
            memory_bytes=_ratio(mean["memory"], 1 if self._on_host else len(self._devices)),
            memory_fraction=_ratio(mean["memory"], self._memory_total()),
            memory_source=self._memory_source(),
            utilisation=mean["utilisation"],
            utilisation_source=self._utilisation_source(),
            host_memory_bytes=mean["host_memory"],
            power_w=mean["power"],
            device_clock_mhz=mean["clock"],
            power_capped=mean["capped"],
            stopped_s=stopped,
        )

    def _run(self):
        begun = due = time.monotonic()
        try:
            while not self._stopping.wait(min(self._interval_s, BEAT_S)):
                self._pulse.beat()
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + self._interval_s
                with self._lock:
                    self._sample()
                self.cost_fraction = time.thread_time() / (time.monotonic() - begun)
        except Exception as error:  # handed to the run's own thread, which would otherwise go on with no samples
            self._error = error

    def _raise_error(self):
        if self._error is not None:
            raise RuntimeError("the sampling thread failed") from self._error

    def _sample(self):
        reading, rss, now = self._reader.sample(), host.rss_bytes(), self._clock()
        if self._stopped_s != (stopped := self.stopped_s()):
            self._stopped_s = stopped
            for integral in self._integrals.values():
                integral.last = None  # nothing is known of the time between
        used = self._memory_used(reading, rss)
        share = self._host_share(now) if self._on_host else reading["utilisation"]
        values = {"memory": used, "host_memory": rss, "utilisation": share, "power": reading["power_w"]}
        values |= {"clock": reading.get("clock_mhz"), "capped": reading.get("power_capped")}
        for key, value in values.items():
            self._integrals[key].add(now, value)
        self._latest = {
            "power_w": reading["power_w"],
            "memory_gb": _ratio(used, 1e9),
            "host_memory_gb": rss / 1e9,
            "utilisation": share,
        }
        return now

    def _host_share(self, now):
        """Share of the usable cores that this process kept busy since the sample before."""
        (then, cpu_then), self._cpu_at = self._cpu_at, (now, host.cpu_seconds())
        return _ratio(self._cpu_at[1] - cpu_then, (now - then) * host.usable_cores())

    def _memory_used(self, reading, rss):
        if self._on_host:
            return rss
        return memory.pool_bytes(self._devices) if self._use_pool else reading["memory_bytes"]

    def _memory_total(self):
        if self._on_host:
            return host.memory_total_bytes()
        return self._reader.memory_total_bytes() or memory.limit_bytes(self._devices)

    def _memory_source(self):
        if self._on_host:
            return "resident memory of the process"
        return "bytes_in_use of JAX's memory pool" if self._use_pool else "nvml memory in use"

    def _utilisation_source(self):
        if self._on_host:
            return f"process CPU time over {host.usable_cores()} cores"
        return f"{self._reader.telemetry} utilisation" if self._reader.telemetry else "no utilisation counter"


def _mean(before, after):
    """Mean between two `(area, seconds)` states of an integral; None if nothing was readable between them."""
    return _ratio(after[0] - before[0], after[1] - before[1])


def _ratio(part, whole):
    return part / whole if part is not None and whole else None
