"""Energy readers beyond NVML: the counters that `zeus` reads, and the file of the user's power meter."""

import bisect
import csv
import math
import os
import time
from collections.abc import Callable, Mapping

from efficientllm.errors import FieldError
from efficientllm.metrics.energy.window import EnergyReader, EnergyWindow
from efficientllm.runtime import optional_packages

LONGEST_GAP_S = 5.0  # between two samples of a meter; a longer gap makes the window void


class ZeusReader(EnergyReader):
    """Differences of energy counters in J. `counters` is `{name: function that reads it}`.

    `tick_s` is their update period; it bounds the error at the edges of a window.
    """

    kind = "measured"

    def __init__(
        self,
        counters: Mapping[str, Callable[[], float]],
        scope: str,
        source: str,
        tick_s: float = 1e-3,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(None, clock)
        self._counters, self._tick_s = counters, tick_s
        self.scope, self.source = scope, source

    def start(self) -> None:
        super().start()
        self._before = {name: read() for name, read in self._counters.items()}

    def stop(self) -> EnergyWindow:
        duration_s = self._duration()
        spent = {name: read() - self._before[name] for name, read in self._counters.items()}
        if fell := [name for name, joules in spent.items() if joules < 0]:
            return self._close(duration_s, reason=f"the counter of {fell[0]} was reset inside the window")
        if not sum(spent.values()):
            return self._close(duration_s, reason="no counter moved inside the window")
        return self._close(duration_s, sum(spent.values()) / duration_s, 2 * self._tick_s / duration_s)


def zeus_reader(platform: str, clock: Callable[[], float] = time.monotonic) -> EnergyReader:
    """A ZeusReader for the platform (`cpu` or `gpu`); without counters, an EnergyReader that says why."""
    try:
        from zeus.device import cpu, gpu, soc
    except ImportError:
        return EnergyReader(
            f"zeus, which would look for other counters, is not installed: {optional_packages.remedy('energy')}", clock
        )
    try:
        if platform == "gpu":
            gpus = gpu.get_gpus()
            counters = {f"GPU {i}": lambda i=i: gpus.get_total_energy_consumption(i) / 1e3 for i in range(len(gpus))}
            return ZeusReader(counters, "gpu", "zeus (AMD GPU counters)", clock=clock)
        try:
            cpus = cpu.get_cpus()
        except cpu.ZeusCPUInitError:
            chip = soc.get_soc()
            return ZeusReader({"SoC": lambda: _joules(chip)}, "module", "zeus (SoC counters)", 0.1, clock)
        counters = {f"CPU package {i}": lambda i=i: _package_joules(cpus, i) for i in range(len(cpus))}
        return ZeusReader(counters, "cpu-package and dram", "zeus (RAPL)", clock=clock)
    except Exception as error:  # zeus has an exception type for each device and each kind of failure
        message = str(error).strip() or type(error).__name__
        return EnergyReader(f"zeus finds no counter: {message.splitlines()[0]}", clock)


def _package_joules(cpus, index):
    energy = cpus.get_total_energy_consumption(index)
    return (energy.cpu_mj + (energy.dram_mj or 0.0)) / 1e3


def _joules(chip):
    energy = chip.get_total_energy_consumption()
    return sum(value for value in vars(energy).values() if isinstance(value, int | float)) / 1e3


class MeterReader(EnergyReader):
    """Power samples of a meter that appends to a CSV during the run: unix time in s, power in W.

    Energy is the trapezoid integral over the window. The window is void if samples do not enclose its edges or leave a
    gap of more than LONGEST_GAP_S. Raises UserError for a file that is missing or has other rows.
    """

    source, scope, kind = "meter", "node", "sampled"

    def __init__(
        self,
        file: str | os.PathLike[str],
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ):
        super().__init__(None, clock)
        self._file, self._sleep = os.fspath(file), sleep
        self._samples()

    def stop(self) -> EnergyWindow:
        end = self._clock()
        begin, duration_s = self._started, self._duration()
        for _ in range(int(LONGEST_GAP_S / 0.1)):  # the first sample after the end may not be written yet
            times, watts = self._samples()
            if times and times[-1] >= end:
                break
            self._sleep(0.1)
        if not times or times[0] > begin or times[-1] < end:
            return self._close(duration_s, reason=f"{self._file} has no samples on both sides of the window")
        first, last = bisect.bisect_right(times, begin) - 1, bisect.bisect_left(times, end)
        gap = max(b - a for a, b in zip(times[first:last], times[first + 1 : last + 1], strict=True))
        if gap > LONGEST_GAP_S:
            return self._close(duration_s, reason=f"{self._file} has a gap of {gap:.1f} s inside the window")
        power = _integral(times[first : last + 1], watts[first : last + 1], begin, end) / (end - begin)
        return self._close(end - begin, power, gap / (end - begin))

    def _samples(self):
        """`(times, watts)` sorted by time; a header is skipped."""
        try:
            with open(self._file, newline="") as file:
                rows = [row for row in csv.reader(file) if row]
        except OSError as error:
            raise FieldError("meter", f"cannot be read: {error.strerror}", self._file) from None
        samples = []
        for number, row in enumerate(rows, 1):
            try:
                at, watts = (float(value) for value in row[:2])
                if not (math.isfinite(at) and math.isfinite(watts)):
                    raise ValueError
                samples.append((at, watts))
            except ValueError:
                if number in (1, len(rows)):  # a header, or a last line that is being written
                    continue
                raise FieldError(
                    "meter",
                    f"line {number}: rows of unix time in s and W are needed, not {','.join(row)!r}",
                    self._file,
                ) from None
        samples.sort()
        return [at for at, _ in samples], [watts for _, watts in samples]


def _integral(times, watts, begin, end):
    """Energy in J between `begin` and `end`, which lie within `times`; power is linear between samples."""
    total = 0.0
    for a, b, low, high in zip(times, times[1:], watts, watts[1:], strict=False):
        start, stop = max(a, begin), min(b, end)
        if stop > start:
            slope = (high - low) / (b - a)
            total += (stop - start) * (low + slope * ((start + stop) / 2 - a))
    return total
