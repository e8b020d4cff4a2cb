"""What the steady part of training takes: step times, energy, memory, utilisation; nothing but training inside."""

import time

from efficientllm.metrics import compiles, conditions, cpu_counters
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.timer import CAP, StepTimer


class Measurement:
    """Segments of finished, steady steps. Evaluation, checkpoints and compilation lie between segments.

    At most `warm_up` steps are set aside first. `start` and `stop` are called with no work in flight; `step_done` when
    a step's outputs have arrived. `compiled` counts programs that were compiled inside segments, whose times and energy
    then mean nothing. Steps within which the process was stopped (by a signal, with its container or its machine) are
    `interrupted` and count for nothing, and their segment has no energy. `seconds` is the time of the `steps`, from the
    first step's begin to the last one's end: the same that the mean of the timer's samples speaks of.
    """

    def __init__(self, reader, sampler, clock=time.perf_counter, warm_up=CAP):
        self._reader, self._sampler, self._clock = reader, sampler, clock
        self.timer = StepTimer(cap=warm_up)
        self.windows, self.averages, self.spans = [], [], []
        self.tokens = self.samples = self.steps = self.compiled = self.interrupted = 0
        self.seconds = 0.0
        self._mark = None

    @property
    def running(self):
        """True inside a segment."""
        return self._mark is not None

    @property
    def steady(self):
        """True once the times of steps have settled, or the cap on waiting for that is reached."""
        return not self.timer.warming

    def start(self):
        """Opens a segment."""
        self._compiled = compiles.count_programs()
        self._before = self.tokens, self.samples, self.steps, self.seconds, len(self.timer.samples)
        self._reader.start()
        self._mark = self._sampler.mark()
        self._edge, self._stopped_at_edge = cpu_counters.read_counters(), self._sampler.stopped_s()
        self.restart_clock()

    def restart_clock(self):
        """The next step's time counts from now."""
        self._stopped = self._sampler.stopped_s()
        self._last = self._clock()

    def step_done(self, tokens, samples=0):
        """Adds a step of `tokens` tokens in `samples` samples -> its seconds."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        before, self._stopped = self._stopped, self._sampler.stopped_s()
        if self._stopped > before:
            self.interrupted += 1
        elif self.running:
            self.timer.add(seconds)
            self.seconds += seconds
            self.tokens += tokens
            self.samples += samples
            self.steps += 1
        elif not self.steady:
            self.timer.add(seconds)
        return seconds

    def stop(self):
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

    def abandon(self):
        """Closes a segment that failed in the middle, and counts none of it."""
        if self.running:
            self._sampler.since(self._mark)
            self._reader.stop()
            self._mark = None
            self.tokens, self.samples, self.steps, self.seconds, count = self._before
            del self.timer.samples[count:]
