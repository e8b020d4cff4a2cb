"""The training loop: the one place where a run's state changes."""

import collections
import contextlib
import dataclasses
import logging
import signal
import threading
import typing

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficientllm import sharding
from efficientllm.runtime import stopping

log = logging.getLogger("efficientllm")
ASK_EVERY = 10  # steps between two questions to the other processes whether one of them was told to stop


class Diverged(RuntimeError):
    """A loss or the gradient is no number any more; `step` is the first such step.

    `state_step` is the step of the state whose loss it was, which no run should go on from; None if the loss is finite.
    """

    def __init__(self, step, value, what="loss", state_step=None):
        super().__init__(f"{what} {value} at step {step}")
        self.step, self.state_step = step, state_step


class Interrupted(RuntimeError):
    """A signal asked the run to stop, and it has: everything up to `step` is saved."""

    def __init__(self, step, signum):
        super().__init__(f"{signal.Signals(signum).name} at step {step}")
        self.step, self.signum = step, signum


@dataclasses.dataclass
class Hooks:
    """What the loop calls between steps; `state` is the finished TrainState.

    log(step, metrics, seconds):    after a step that is due for `log_every`, metrics on the host.
    evaluate(step, state) -> loss:  held-out loss; raises Diverged if it is no number.
    save(step, state, loss):        starts a checkpoint; `saving()` is True until it is on disk.
    """

    log: typing.Callable
    evaluate: typing.Callable
    save: typing.Callable
    saving: typing.Callable


@contextlib.contextmanager
def catch_signals(names=("SIGINT", "SIGTERM")):
    """Collects the signals that ask for a stop; a second one of a kind acts as it always does."""
    caught = collections.deque()

    def handler(signum, _):
        stopping.note_handled()
        caught.append(signum)
        signal.signal(signum, before[signum])

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield caught
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def train(config, state, compiled, batches, mesh, measurement, progress, hooks):
    """Runs from `state.step` to `config.train.steps` and returns the last TrainState.

    A step's outputs are fetched after the next step is dispatched, so that the device never waits for the host.
    Raises Diverged, Interrupted.
    """
    loop = _Loop(config, measurement, progress, hooks)
    with catch_signals() as caught:
        step = int(state.step)
        measurement.restart_clock()
        while step < config.train.steps:
            loop.begin_segment_if_steady()
            state, metrics = compiled(state, sharding.to_device(next(batches), mesh))
            step += 1
            loop.collect()
            loop.pending = (step, metrics)
            stop = _agreed(caught, step)
            if stop or loop.is_due(step):
                loop.collect(last=True)
                loop.between_steps(step, state, stop)
                measurement.restart_clock()
            if stop:
                raise Interrupted(step, stop)
    return state


class _Loop:
    def __init__(self, config, measurement, progress, hooks):
        self._config, self._measurement, self._progress, self._hooks = config, measurement, progress, hooks
        self.pending = None

    def begin_segment_if_steady(self):
        """Opens a measured segment as soon as the times have settled and no checkpoint is being written."""
        if self._measurement.steady and not self._measurement.running and not self._hooks.saving():
            self.collect()
            self._measurement.start()

    def collect(self, last=False):
        """Waits for the step in flight and takes note of it, as the segment's `last` where it is. Raises Diverged."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, grad_norm, tokens, samples = (float(metrics[key]) for key in ("loss", "grad_norm", "tokens", "samples"))
        seconds = self._measurement.step_done(tokens, samples)
        self._progress.add(tokens)
        if not np.isfinite(loss):
            raise Diverged(step, loss, state_step=step - 1)
        if not np.isfinite(grad_norm):
            raise Diverged(step, grad_norm, "gradient norm")
        if last:  # what is logged now has no next step to run beside
            self._measurement.stop()
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            self._hooks.log(step, jax.device_get(metrics), seconds)

    def is_due(self, step):
        """True where the loop pauses after `step`: to evaluate, to save, or at the end."""
        return self._eval_due(step) or self._save_due(step)

    def between_steps(self, step, state, stop):
        """Evaluates and saves what is due after `step`; a stop saves and does not evaluate."""
        loss = None
        try:
            if self._eval_due(step) and not stop:
                loss = self._hooks.evaluate(step, state)
        except Diverged:
            raise
        except Exception:  # what was trained is not lost with what could not be evaluated
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


def _agreed(caught, step):
    """The signal to stop for, or 0; all processes stop at the same step, whichever of them was told to."""
    signum = caught[0] if caught else 0
    if jax.process_count() == 1:
        return signum
    if step % ASK_EVERY:
        return 0
    return int(np.max(multihost_utils.process_allgather(np.int32(signum))))
