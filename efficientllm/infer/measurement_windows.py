"""Measured windows of an inference run: time, energy and load of repeated work, without what disturbed it."""

import collections
import math
import time
import typing
from collections.abc import Callable

from efficientllm.metrics import compiles, conditions, cpu_counters, sampler, timer
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.energy.window import EnergyReader

WINDOW_S = 2.0  # least length of an energy window
Result = typing.TypeVar("Result")
AGAIN = 5  # retries of a window in which the process was paused or compiled a program


class Windows:
    """Windows by name, and the times of single steps.

    times:        seconds of one call, of each window.
    counts:       calls in all windows of a name.
    steps:        times of single steps, each waited for.
    interrupted:  windows and steps that were discarded because the process was paused.
    """

    def __init__(self, reader: EnergyReader, averages: sampler.Sampler) -> None:
        self._reader, self._sampler = reader, averages
        self._parts: list[sampler.Averages] = []
        self._energy: dict[str, list[energy.EnergyWindow]] = collections.defaultdict(list)
        self._faults: list[str] = []
        self.times: dict[str, list[float]] = collections.defaultdict(list)
        self.counts: collections.Counter[str] = collections.Counter()
        self.steps = timer.StepTimer(cap=5)
        self.interrupted = 0

    def begin(self) -> None:
        """Records the start counters for `span`."""
        self._begin, self._stopped = cpu_counters.read_counters(), self._sampler.stopped_s()

    def measure(self, name: str, call: Callable[[], typing.Any], expected_s: float) -> None:
        """Measures a window of `call`, which takes about `expected_s`: as often as the energy reader needs."""
        calls = 1 if self._reader.reason else max(1, math.ceil(WINDOW_S / expected_s))
        for last in [False] * AGAIN + [True]:
            compiled = compiles.count_programs()
            with self._reader.window() as window:
                mark = self._sampler.mark()
                seconds = seconds_of(lambda: [call() for _ in range(calls)])
                averages = self._sampler.since(mark)
            self._faults.extend(self._reader.faults())
            compiled = compiles.count_programs() - compiled
            if not averages.stopped_s and not compiled:
                break
            self.interrupted += not last
        self._add(name, window.result, averages, seconds, calls, compiled)

    def measure_once(self, name: str, call: Callable[[], Result]) -> Result:
        """Measures a window of one `call` and returns its result, which is kept: the call is never repeated."""
        compiled = compiles.count_programs()
        with self._reader.window() as window:
            mark, begin = self._sampler.mark(), time.perf_counter()
            result = call()
            seconds, averages = time.perf_counter() - begin, self._sampler.since(mark)
        self._faults.extend(self._reader.faults())
        self._add(name, window.result, averages, seconds, 1, compiles.count_programs() - compiled)
        return result

    def _add(self, name, window, averages, seconds, calls, compiled):
        """Adds a window of `calls` calls, without its energy if a program was compiled or the process paused in it."""
        self._parts.append(averages)
        self.times[name].append((seconds - averages.stopped_s) / calls)
        self.counts[name] += calls
        invalid = compiled and energy.COMPILED or averages.stopped_s and energy.STOPPED.format(averages.stopped_s)
        self._energy[name].append(energy.void_window(window, invalid) if invalid else window)

    def measure_step(self, call: Callable[[], typing.Any]) -> None:
        """Times one step; it is not counted if the process was paused during it."""
        stopped, compiled = self._sampler.stopped_s(), compiles.count_programs()
        seconds = seconds_of(call)
        if self._sampler.stopped_s() > stopped:
            self.interrupted += 1
        elif self.steps.warming or compiles.count_programs() == compiled:
            self.steps.add(seconds)

    def energy_of(self, name: str) -> energy.EnergyWindow:
        """Returns the energy of all windows of a name."""
        return energy.combine_windows(self._energy[name])

    def averages(self) -> sampler.Averages:
        """Returns the averages of all windows."""
        return sampler.combine_averages(self._parts)

    def span(self) -> conditions.Span:
        """Returns the conditions of the machine since `begin`."""
        stopped = self._sampler.stopped_s() - self._stopped
        return conditions.span_between(self._begin, cpu_counters.read_counters(), stopped, self._faults)


def seconds_of(call: Callable[[], typing.Any]) -> float:
    """Times a call, which waits for its result."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
