"""Training loop: dispatches steps, fetches their metrics one step behind, evaluates, saves and stops."""

import collections
import contextlib
import dataclasses
import logging
import signal
import threading
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficientllm import sharding
from efficientllm.runtime import stopping
from efficientllm.train.measure import Measurement
from efficientllm.train.profiler import Profiler
from efficientllm.train.programs import PROGRAM
from efficientllm.train.progress import Progress
from efficientllm.train.step import TrainState
from efficientllm.typing import Batch, Config

log = logging.getLogger("efficientllm")
ASK_EVERY = 10  # steps between two all-gathers of the processes' stop signals


class Diverged(RuntimeError):
    """The loss or the gradient norm is NaN or infinite; `step` is the first such step.

    `state_step` is the step of the parameters with that loss, from which no run should resume; None where only the
    gradient norm is not finite.
    """

    def __init__(self, step: int, value: float, what: str = "loss", state_step: int | None = None) -> None:
        super().__init__(f"{what} {value} at step {step}")
        self.step, self.state_step = step, state_step


class Interrupted(RuntimeError):
    """The run was stopped by a signal; a checkpoint of `step` has been started."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} at step {step}")
        self.step, self.signum = step, signum


@dataclasses.dataclass
class Hooks:
    """Callbacks of the loop; `state` is the TrainState after `step`.

    log(step, metrics, seconds):    called every `log_every` steps, with metrics on the host.
    evaluate(step, state) -> loss:  the held-out loss; raises Diverged if it is NaN or infinite.
    save(step, state, loss):        starts to write a checkpoint; `saving()` is True until it is on disk.
    """

    log: typing.Callable
    evaluate: typing.Callable
    save: typing.Callable
    saving: typing.Callable


@contextlib.contextmanager
def catch_signals(names: Sequence[str] = ("SIGINT", "SIGTERM")) -> Iterator[collections.deque[int]]:
    """Yields a deque that collects signals; a second signal of the same kind gets the default handling."""
    signals: collections.deque[int] = collections.deque()

    def handler(signum, _):
        stopping.note_handled()
        signals.append(signum)
        signal.signal(signum, before[signum])

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield signals
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def train(
    config: Config,
    state: TrainState,
    compiled: Callable,
    batches: Iterator[Batch],
    shardings: dict[str, jax.sharding.NamedSharding],
    measurement: Measurement,
    progress: Progress,
    hooks: Hooks,
    profiler: Profiler | None = None,
) -> TrainState:
    """Trains from `state.step` to `config.train.steps` -> the last TrainState.

    `shardings` are those of a batch's arrays.

    A step's outputs are fetched after the next step is dispatched, so that the device never waits for the host.
    Raises Diverged, Interrupted.
    """
    profiler = profiler or Profiler()
    loop = _Loop(config, measurement, progress, hooks, profiler)
    with catch_signals() as signals, contextlib.ExitStack() as on_exit:
        on_exit.callback(profiler.stop)
        step = int(state.step)
        measurement.restart_clock()
        while step < config.train.steps:
            loop.begin_profile_if_due(step + 1)
            loop.begin_segment_if_steady()
            with profiler.of_step(step + 1):
                state, metrics = compiled(state, sharding.to_compiled(next(batches), shardings))
            step += 1
            loop.collect()
            loop.pending = (step, metrics)
            stop = _agree_on_signal(signals, step)
            if stop or loop.is_due(step):
                loop.collect(end_segment=True)
                loop.between_steps(step, state, stop)
                measurement.restart_clock()
            if stop:
                raise Interrupted(step, stop)
    return state


class _Loop:
    """The host's part of the loop. `pending` is `(step, metrics)` of the dispatched step, or None."""

    def __init__(self, config, measurement, progress, hooks, profiler=None):
        self._config, self._measurement, self._progress, self._hooks = config, measurement, progress, hooks
        self._profiler = profiler or Profiler()
        self.pending = None

    def begin_profile_if_due(self, step):
        """Starts the trace before `step` if that is the first to be profiled, with no other in flight."""
        if self._profiler.starts_before(step):
            self.collect(end_segment=True)
            self._profiler.start()
            self._measurement.profiling = True
            self._measurement.restart_clock()

    def begin_segment_if_steady(self):
        """Opens a measured segment once step times have settled and no checkpoint is being written or step traced."""
        can_start = self._measurement.steady and not self._measurement.running and not self._measurement.profiling
        if can_start and not self._hooks.saving():  # asked last: the answer takes 0.04 ms
            self.collect()
            self._measurement.start()

    def collect(self, end_segment=False):
        """Awaits the pending step, records and logs it; `end_segment` closes the measured segment. Raises Diverged."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, grad_norm, tokens, samples = (float(metrics[key]) for key in ("loss", "grad_norm", "tokens", "samples"))
        seconds = self._measurement.step_done(tokens, samples, metrics.get(PROGRAM, 0))
        self._progress.add(tokens if self._progress.unit == "tokens" else samples)
        if not np.isfinite(loss):
            raise Diverged(step, loss, state_step=step - 1)
        if not np.isfinite(grad_norm):
            raise Diverged(step, grad_norm, "gradient norm")
        if end_segment:  # before logging, which here overlaps with no step
            self._measurement.stop()
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            self._hooks.log(step, jax.device_get(metrics), seconds)

    def is_due(self, step):
        """True where the loop pauses after `step`: to evaluate, to save, to write a trace, or at the end."""
        return self._eval_due(step) or self._save_due(step) or self._profiler.ends_after(step)

    def between_steps(self, step, state, stop):
        """Writes the trace, evaluates and saves where due after `step`. A stop saves without evaluating."""
        if self._profiler.ends_after(step):
            self._profiler.stop()
            self._measurement.profiling = False
        loss = None
        try:
            if self._eval_due(step) and not stop:
                loss = self._hooks.evaluate(step, state)
        except Diverged:
            raise
        except Exception:  # save the trained state although its evaluation failed
            if self._save_due(step):
                self._hooks.save(step, state, None)
            raise
        if self._save_due(step) or stop:
            self._hooks.save(step, state, loss)

    def _eval_due(self, step):
        return step == self._config.train.steps or _every(self._config.eval.every, step)

    def _save_due(self, step):
        return step == self._config.train.steps or _every(self._config.checkpoint.every, step)


def _every(interval, step):
    return bool(interval) and step % interval == 0


def _agree_on_signal(signals, step):
    """The signal to stop for, or 0. All processes get the same answer at the same step, whichever had the signal."""
    signum = signals[0] if signals else 0
    if jax.process_count() == 1:
        return signum
    if step % ASK_EVERY:
        return 0
    return int(np.max(multihost_utils.process_allgather(np.int32(signum))))
