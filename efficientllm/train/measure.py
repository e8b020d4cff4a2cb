"""Measurement of steady training steps: times, energy, memory and utilisation, without evaluation and checkpoints."""

import collections
import time
import typing
from collections.abc import Callable

from efficientllm.metrics import compiles, conditions, cpu_counters, pauses
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.metrics.sampler import Averages, Sampler
from efficientllm.metrics.timer import CAP, StepTimer


class Measurement:
    """Segments of steady steps; evaluation, checkpoints and compilation happen between segments.

    Up to `warm_up` steps are discarded first. Call `start` and `stop` with no step in flight, and `step_done` when the
    outputs of a step have arrived.

    steps, tokens, samples, seconds:  totals over all segments.
    programs:     of the steps, how many ran each program (`train.programs`).
    compiled:     programs compiled inside segments; if any, times and energy are invalid.
    profiled:     seconds of the steps that were traced (`profiling`), which are not counted.
    profiled_programs:  of these, how many ran each program.
    interrupted:  steps during which the process was paused (by a signal, its container or its machine). They are not
                  counted, and their segment has no energy.
    unwatched:    steps after warm-up outside segments: beside the writing of a checkpoint. They are not counted.
    """

    def __init__(
        self, reader: EnergyReader, sampler: Sampler, clock: Callable[[], float] = time.perf_counter, warm_up: int = CAP
    ) -> None:
        self._reader, self._sampler, self._clock = reader, sampler, clock
        self.timer = StepTimer(cap=warm_up)
        self.windows: list[energy.EnergyWindow] = []
        self.averages: list[Averages] = []
        self.spans: list[conditions.Span] = []
        self.tokens: float = 0
        self.samples: float = 0
        self.programs: collections.Counter[int] = collections.Counter()
        self.steps = self.compiled = self.interrupted = self.unwatched = 0
        self.seconds = 0.0
        self.profiling = False
        self.profiled: list[float] = []
        self.profiled_programs: collections.Counter[int] = collections.Counter()
        self._mark: typing.Any = None

    @property
    def running(self) -> bool:
        """True inside a segment."""
        return self._mark is not None

    @property
    def steady(self) -> bool:
        """True once step times have settled, or `warm_up` steps have been discarded."""
        return not self.timer.warming

    def start(self) -> None:
        """Opens a segment."""
        self._compiled = compiles.count_programs()
        self._before = (
            self.tokens,
            self.samples,
            self.steps,
            self.seconds,
            len(self.timer.samples),
            self.programs.copy(),
        )
        self._reader.start()
        self._mark = self._sampler.mark()
        self._edge, self._stopped_at_edge = cpu_counters.read_counters(), self._sampler.stopped_s()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts the next step's time now."""
        self._stopped = self._sampler.stopped_s()
        self._last = self._clock()

    def step_done(self, tokens: float, samples: float = 0, program: int = 0) -> float:
        """Adds a step of `tokens` tokens in `samples` samples, of a program -> its seconds."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        before = self._stopped
        if seconds > pauses.LATE_S:  # no pause is shorter, and the answer takes 0.02 ms
            self._stopped = self._sampler.stopped_s()
        if self.profiling:
            self.profiled.append(seconds)
            self.profiled_programs[program] += 1
        elif self._stopped > before:
            self.interrupted += 1
        elif self.running:
            self.timer.add(seconds)
            self.seconds += seconds
            self.tokens += tokens
            self.samples += samples
            self.steps += 1
            self.programs[program] += 1
        elif not self.steady:
            self.timer.add(seconds)
        else:
            self.unwatched += 1
        return seconds

    def stop(self) -> None:
        """Closes the segment, if one is open."""
        if self.running:
            self.averages.append(self._sampler.since(self._mark))
            stopped, edge = self._sampler.stopped_s() - self._stopped_at_edge, cpu_counters.read_counters()
            window, compiled = self._reader.stop(), compiles.count_programs() - self._compiled
            self.spans.append(conditions.span_between(self._edge, edge, stopped, self._reader.faults()))
            if compiled or stopped:
                window = energy.void_window(window, energy.COMPILED if compiled else energy.STOPPED.format(stopped))
            self.compiled += compiled
            self.windows.append(window)
            self._mark = None

    def abandon(self) -> None:
        """Closes the open segment and subtracts its steps from the totals."""
        if self.running:
            self._sampler.since(self._mark)
            self._reader.stop()
            self._mark = None
            self.tokens, self.samples, self.steps, self.seconds, count, self.programs = self._before
            del self.timer.samples[count:]
