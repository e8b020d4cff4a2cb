"""NVML energy readers: the energy counter aligned to its ticks, or sampled power."""

import itertools
import statistics
import threading
import typing
from collections.abc import Callable, Sequence

from efficientllm.metrics.energy.nvml import Gpu
from efficientllm.metrics.energy.window import EnergyReader, EnergyWindow

POLL_S = 0.002  # polling interval while waiting for a tick of the counter
TICK_TIMEOUT_S = 0.5  # counters tick about every 0.1 s
UNALIGNED_TICKS = 6**-0.5  # standard deviation, in ticks, of the difference of two edges at random places within a tick
MAX_GAP_S = 0.5  # between two power samples; a longer gap makes the window void
AVERAGING_S = 1.0  # the driver's averaging time for power on Ampere (except GA100) and later


class NvmlReader(EnergyReader):
    """Telemetry of NVIDIA GPUs, and the faults that make a window void if any GPU has them."""

    telemetry = "nvml"

    def __init__(self, gpus: Sequence[Gpu], clock: Callable[[], float]):
        super().__init__(None, clock)
        self.gpus = gpus
        self._faults: set[str] = set()

    def sample(self) -> dict[str, float | None]:
        """See EnergyReader. Also records slowdowns, for those that end before the window does."""
        self._faults.update(slowdown for gpu in self.gpus for slowdown in gpu.slowdowns())
        power = [gpu.power_instant_w() for gpu in self.gpus]
        if None in power:
            power = [gpu.power_average_w() for gpu in self.gpus]
        used = [gpu.memory_bytes()[0] for gpu in self.gpus]
        shares = [gpu.utilisation() for gpu in self.gpus]
        clocks = [gpu.clocks_mhz()["sm"] for gpu in self.gpus]
        capped = [gpu.power_capped() for gpu in self.gpus]
        return {
            "power_w": None if None in power else sum(power),
            "memory_bytes": None if None in used else sum(used),
            "utilisation": None if None in shares else statistics.fmean(shares),
            "clock_mhz": None if None in clocks else statistics.fmean(clocks),
            "power_capped": None if None in capped else statistics.fmean(capped),
        }

    def memory_total_bytes(self) -> int | None:
        """See EnergyReader."""
        totals = [gpu.memory_bytes()[1] for gpu in self.gpus]
        return None if None in totals else sum(totals)

    def describe(self) -> dict[str, typing.Any]:
        """See EnergyReader."""
        return {
            "uuids": [gpu.uuid() for gpu in self.gpus],
            "pci_bus_ids": [gpu.pci_bus_id for gpu in self.gpus],
            "power_limit_w": [gpu.power_limit_w() for gpu in self.gpus],
            "power_capped": [gpu.power_capped() for gpu in self.gpus],
            "clocks_mhz": [gpu.clocks_mhz() for gpu in self.gpus],
            **self.gpus[0].driver(),
        }

    def faults(self) -> tuple[str, ...]:
        """See EnergyReader."""
        return tuple(sorted(self._faults))

    def start(self) -> None:
        """See EnergyReader."""
        self._forbid_open()
        self._faults = set()
        self._inspect()
        self._align()
        super().start()

    def _align(self):
        """Waits until a window may begin; by default at once."""

    def _inspect(self):
        for gpu in self.gpus:
            self._faults.update(gpu.slowdowns())
            if others := gpu.other_processes():
                self._faults.add(f"{others} other process(es) on the GPU at {gpu.pci_bus_id}")

    def _fault(self):
        self._inspect()
        return "; ".join(sorted(self._faults)) or None


class CounterReader(NvmlReader):
    """Differences of the energy counter between two of its ticks.

    The counter ticks about every 0.1 s. `start` waits for a tick. `stop` waits for the next tick after the work and
    goes one period back, to the last tick within the work. Between these two ticks the energy is exact up to the
    polling interval; their mean power stands for the whole window, which is at most one tick longer. Idle time
    before and after the work is therefore not counted as work.
    """

    source, kind = "nvml energy counter", "measured"

    def __init__(self, gpus: Sequence[Gpu], clock: Callable[[], float], sleep: Callable[[float], None]):
        super().__init__(gpus, clock)
        self._sleep = sleep
        self.scope = "module" if any(gpu.is_superchip() for gpu in gpus) else "gpu"
        self.reason, self._period_s, self._jitter_s = self._calibrate()

    def _calibrate(self):
        """`(reason why the counter is unusable or None, tick period in s, spread of the period)`, from four ticks."""
        counts = self._counts()
        if None in counts:
            return _refusal(self.gpus, "energy counter"), 0, 0
        times = []
        for _ in range(4):
            ticks = self._next_ticks(counts)
            if None in ticks:
                return f"frozen, no tick in {TICK_TIMEOUT_S} s", 0, 0
            times.append([time for time, _ in ticks])
            counts = [energy for _, energy in ticks]
        periods = [b - a for early, late in itertools.pairwise(times) for a, b in zip(early, late, strict=True)]
        return None, statistics.median(periods), max(periods) - min(periods)

    def _counts(self):
        return [gpu.energy_j() for gpu in self.gpus]

    def _next_ticks(self, counts):
        """`(time, joules)` per GPU when its counter first differs from `counts`; None on a timeout."""
        ticks = [None] * len(self.gpus)
        deadline = self._clock() + TICK_TIMEOUT_S
        while None in ticks and self._clock() < deadline:
            for i, gpu in enumerate(self.gpus):
                energy = gpu.energy_j() if ticks[i] is None else None
                if energy is not None and energy != counts[i]:
                    ticks[i] = (self._clock(), energy)
            if None in ticks:
                self._sleep(POLL_S)
        return ticks

    def _align(self):
        """Waits until the counter of every GPU has ticked."""
        self._first = self._next_ticks(self._counts())

    def stop(self) -> EnergyWindow:
        """See EnergyReader. Takes up to one tick longer than the window."""
        duration_s, counts = self._duration(), self._counts()
        reason = self._fault() or self._counter_fault(counts, duration_s)
        if reason:
            return self._close(duration_s, reason=reason)
        power_w, spans, edges = 0.0, [], []
        for first, count, after in zip(self._first, counts, self._next_ticks(counts), strict=True):
            span, edge = self._span(first, after, duration_s)
            if span <= 0:
                return self._close(duration_s, reason=self._too_short(duration_s))
            power_w += (count - first[1]) / span
            spans.append(span)
            edges.append(edge)
        return self._close(duration_s, power_w, max(edges) / min(spans))

    def _span(self, first, after, duration_s):
        """`(seconds between the first and the last tick within the work, their uncertainty)` of one GPU."""
        if after is None:
            return duration_s, UNALIGNED_TICKS * self._period_s
        idle_s = self._started - first[0]  # spent waiting for another GPU's tick
        return after[0] - self._period_s - first[0], 2 * POLL_S + self._jitter_s + idle_s

    def _counter_fault(self, counts, duration_s):
        if None in counts or None in self._first:
            return "the energy counter could not be read at an edge of the window"
        moved = [count - first[1] for first, count in zip(self._first, counts, strict=True)]
        if min(moved) < 0:
            return "the energy counter was reset"
        if 0 in moved:
            return self._too_short(duration_s) if duration_s < 2 * self._period_s else "the energy counter is frozen"
        return None

    def _too_short(self, duration_s):
        return (
            f"a window of {duration_s:.3g} s holds no whole tick of the counter ({self._period_s:.3g} s): "
            "repeat the work until it is longer"
        )


class PowerReader(NvmlReader):
    """Trapezoid integral of the power that `sample()` reads while a window is open.

    A Sampler (or the work) must call `sample()` every 20 to 100 ms.
    """

    kind, scope = "sampled", "gpu"

    def __init__(self, gpus: Sequence[Gpu], field: str, clock: Callable[[], float]):
        super().__init__(gpus, clock)
        self.source = f"nvml {field} power"
        self._averaged = field == "averaged"
        self._read = [gpu.power_average_w if self._averaged else gpu.power_instant_w for gpu in gpus]
        self._lock = threading.Lock()
        self._points: list[tuple[float, float | None]] = []
        if self._power() is None:
            self.reason = _refusal(gpus, f"{field} power")

    def _power(self):
        power = [read() for read in self._read]
        return None if None in power else sum(power)

    def sample(self) -> dict[str, float | None]:
        """See EnergyReader."""
        reading = {**super().sample(), "power_w": self._power()}
        with self._lock:
            self._points.append((self._clock(), reading["power_w"]))
            if self._started is None:
                self._points.clear()
        return reading

    def start(self) -> None:
        """See EnergyReader."""
        super().start()
        self.sample()

    def stop(self) -> EnergyWindow:
        """See EnergyReader."""
        self.sample()
        with self._lock:
            duration_s, points, self._points = self._duration(), self._points, []
        gap_s = max((b - a for (a, _), (b, _) in itertools.pairwise(points)), default=0)
        reason = self._fault() or self._power_fault(points, gap_s)
        if reason:
            return self._close(duration_s, reason=reason)
        energy_j = sum((b - a) * (p + q) / 2 for (a, p), (b, q) in itertools.pairwise(points))
        span_s = points[-1][0] - points[0][0]
        return self._close(duration_s, energy_j / span_s, (AVERAGING_S if self._averaged else gap_s) / span_s)

    def _power_fault(self, points, gap_s):
        if any(power is None for _, power in points):
            return "power could not be read during the window"
        if gap_s > MAX_GAP_S:
            return f"power went unread for {gap_s:.2f} s: run a Sampler during the window"
        return None if points[-1][0] > points[0][0] else "the window is empty"


def _refusal(gpus, name):
    """The driver's message for a refused reading, from the first GPU that refused it."""
    return next(gpu.refusals[name] for gpu in gpus if name in gpu.refusals)
