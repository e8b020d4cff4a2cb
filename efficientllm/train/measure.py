"""What the steady part of training takes: step times, energy, memory, utilisation; nothing but training inside."""

import dataclasses
import time

from efficientllm.metrics import compiles
from efficientllm.metrics.timer import CAP, StepTimer

COMPILED = "a program was compiled inside the window"


class Measurement:
    """Segments of finished, steady steps. Evaluation, checkpoints and compilation lie between segments.

    At most `warm_up` steps are set aside first. `start` and `stop` are called with no work in flight; `step_done` when
    a step's outputs have arrived. `compiled` counts programs that were compiled inside segments, whose times and energy
    then mean nothing.
    """

    def __init__(self, reader, sampler, clock=time.perf_counter, warm_up=CAP):
        self._reader, self._sampler, self._clock = reader, sampler, clock
        self.timer = StepTimer(cap=warm_up)
        self.windows, self.averages = [], []
        self.tokens = self.samples = self.steps = self.compiled = 0
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
        self._compiled = compiles.count()
        self._before = self.tokens, self.samples, self.steps
        self._reader.start()
        self._mark = self._sampler.mark()
        self._begin = self.restart_clock()

    def restart_clock(self):
        """The next step's time counts from now; returns now."""
        self._last = self._clock()
        return self._last

    def step_done(self, tokens, samples=0):
        """Adds a step of `tokens` tokens in `samples` samples -> its seconds."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        if self.running:
            self.timer.add(seconds)
            self.tokens += tokens
            self.samples += samples
            self.steps += 1
        elif not self.steady:
            self.timer.add(seconds)
        return seconds

    def stop(self):
        """Closes the segment, if one is open."""
        if self.running:
            self.seconds += self._clock() - self._begin
            self.averages.append(self._sampler.since(self._mark))
            window, compiled = self._reader.stop(), compiles.count() - self._compiled
            if compiled and window.energy_j is not None:
                window = dataclasses.replace(
                    window, energy_j=None, mean_power_w=None, error_bound=None, reason=COMPILED
                )
            self.compiled += compiled
            self.windows.append(window)
            self._mark = None

    def abandon(self):
        """Closes a segment that failed in the middle, and counts none of it."""
        if self.running:
            self._sampler.since(self._mark)
            self._reader.stop()
            self._mark = None
            self.tokens, self.samples, self.steps = self._before
