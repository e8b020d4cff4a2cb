"""Background sampling of power, memory and utilisation, and time-weighted averages over any stretch of a run."""

from __future__ import annotations

import dataclasses
import threading
import time
import typing
from collections.abc import Callable, Sequence

from efficientllm.metrics import host, memory
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.metrics.pauses import BEAT_S, PauseDetector

if typing.TYPE_CHECKING:  # reports import this module and start without JAX
    import jax


@dataclasses.dataclass(frozen=True)
class Averages:
    """Time-weighted means over a stretch of a run; None where nothing could be read.

    memory_bytes:     per device (CPU: of this process); `memory_source` names the counter.
    memory_fraction:  of the device's memory (CPU: of the machine's), 0..1.
    utilisation:      mean over devices, 0..1; `utilisation_source` names the counter.
    power_w:          sum over devices.
    device_clock_mhz: mean over devices.
    power_capped:     share of the samples in which a power limit lowered the clocks.
    stopped_s:        time in which the process was stopped; excluded from `duration_s` and from the means.
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


Mark = tuple[float, float, dict[str, tuple[float, float]], float]  # time, CPU time, sums, stopped time
MEANS = (
    "memory_bytes",
    "memory_fraction",
    "utilisation",
    "host_memory_bytes",
    "power_w",
    "device_clock_mhz",
    "power_capped",
)


def combine_averages(stretches: Sequence[Averages]) -> Averages:
    """Merges the Averages of several stretches of one run, weighted by their durations."""
    if not stretches:
        return Averages(0.0, None, None, "nothing was sampled", None, "nothing was sampled", None, None)
    means = {}
    for key in MEANS:
        weighted = [
            (getattr(stretch, key), stretch.duration_s) for stretch in stretches if getattr(stretch, key) is not None
        ]
        means[key] = _ratio(
            sum(value * seconds for value, seconds in weighted), sum(seconds for _, seconds in weighted)
        )
    sums = {key: sum(getattr(stretch, key) for stretch in stretches) for key in ("duration_s", "stopped_s")}
    return dataclasses.replace(stretches[0], **sums, **means)


@dataclasses.dataclass
class _Integral:
    """Time integral of a sampled quantity by the trapezoid rule, over the time in which it was readable."""

    area: float = 0.0
    seconds: float = 0.0
    last: tuple | None = None

    def add(self, now, value):
        if value is not None and self.last is not None:
            self.area += (now - self.last[0]) * (value + self.last[1]) / 2
            self.seconds += now - self.last[0]
        self.last = None if value is None else (now, value)


class Sampler:
    """Samples every `interval_s` seconds from `start()` to `stop()`, or within a `with` block.

        begin = sampler.mark()
        ...
        averages = sampler.since(begin)

    `cost_fraction` is the CPU time of the thread over its wall time: the share of one core that sampling takes.
    An error in the thread is raised by the next call of `mark`, `since` or `stop`.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],
        reader: EnergyReader,
        interval_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._devices, self._reader, self._interval_s, self._clock = devices, reader, interval_s, clock
        self._on_host = devices[0].platform == "cpu"
        self._use_pool = not self._on_host and (memory.preallocates(devices) or reader.memory_total_bytes() is None)
        names = ("memory", "host_memory", "utilisation", "power", "clock", "capped")
        self._integrals = {name: _Integral() for name in names}
        self._latest: dict[str, float | None] = {}
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._pauses: PauseDetector | None = None
        self._stopped_s = 0.0
        self.cost_fraction = 0.0
        self._cpu_at = (self._clock(), host.cpu_seconds())

    def start(self) -> typing.Self:
        """Starts the thread."""
        self._pauses = PauseDetector()
        self._thread = threading.Thread(target=self._run, name="metrics-sampler", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread and waits for it. May be called more than once."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._raise_error()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def stopped_s(self) -> float:
        """Time in s in which the process was stopped since `start()`; see `pauses`."""
        return self._pauses.beat() if self._pauses else 0.0

    def latest(self) -> dict[str, float]:
        """The latest sample as scalars for a chart, `{"power_w": ..., "memory_gb": ...}`; omits unreadable ones."""
        return {key: value for key, value in self._latest.items() if value is not None}

    def mark(self) -> Mark:
        """Marks a point in time, for `since`."""
        self._raise_error()
        with self._lock:
            now = self._sample()
            sums = {key: (integral.area, integral.seconds) for key, integral in self._integrals.items()}
        return now, host.cpu_seconds(), sums, self._stopped_s

    def since(self, mark: Mark) -> Averages:
        """Averages from `mark` until now."""
        begin, cpu_begin, before, stopped_before = mark
        end, cpu_end, after, stopped = self.mark()
        mean = {key: _mean(before[key], after[key]) for key in after}
        stopped -= stopped_before
        seconds = max(0.0, end - begin - stopped)
        if self._on_host:  # exact, from the counters at both edges; a mean of samples is not
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
                self._pauses.beat()
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + self._interval_s
                with self._lock:
                    self._sample()
                self.cost_fraction = time.thread_time() / (time.monotonic() - begun)
        except Exception as error:  # re-raised in the caller's thread, which would otherwise go on without samples
            self._error = error

    def _raise_error(self):
        if self._error is not None:
            raise RuntimeError("the sampling thread failed") from self._error

    def _sample(self):
        reading, rss, now = self._reader.sample(), host.rss_bytes(), self._clock()
        if self._stopped_s != (stopped := self.stopped_s()):
            self._stopped_s = stopped
            for integral in self._integrals.values():
                integral.last = None  # nothing was sampled while the process was stopped
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
        """Share of the usable cores that this process used since the previous sample."""
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
    """Mean between two `(area, seconds)` states of an integral; None if no sample between them was readable."""
    return _ratio(after[0] - before[0], after[1] - before[1])


def _ratio(numerator, denominator):
    return numerator / denominator if numerator is not None and denominator else None
