"""Trace of some training steps by JAX's profiler, in a folder that TensorBoard and Perfetto open."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import jax

from efficientllm.config.profiled_steps import read_steps

log = logging.getLogger("efficientllm")


class Profiler:
    """Traces the `steps` of a run, as one stretch, into the run's folder; without a folder it writes nothing.

    Call `start` and `stop` with no step in flight. Python's calls are left out of the trace: recording them takes time.
    """

    def __init__(self, steps: range = range(0), folder: pathlib.Path | None = None) -> None:
        self._steps, self._folder = steps, folder
        self._writes = False
        self.running = False

    @classmethod
    def of(cls, steps: str, first_step: int, folder: pathlib.Path | None) -> "Profiler":
        """Makes the profiler of `config.profile.steps`; a run that resumes after them is told so."""
        traced = read_steps(steps)
        if traced and traced[-1] <= first_step:
            log.warning(f"config.profile.steps = {steps!r}: the run resumes after them")
        return cls(traced, folder)

    def starts_before(self, step: int) -> bool:
        """Whether the trace is to start before `step`, which is the first of those that are left."""
        return step in self._steps and not self.running

    def ends_after(self, step: int) -> bool:
        """Whether `step` is the last that is traced."""
        return self.running and step == self._steps[-1]

    def start(self) -> None:
        """Starts the trace."""
        self.running = True
        if self._folder is None:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        try:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True, profiler_options=options)
            self._writes = True
        except RuntimeError as error:  # a process has one trace at a time
            log.warning("no trace of config.profile.steps: %s", error)

    def stop(self) -> None:
        """Ends the trace and writes it, if there is one."""
        self.running = False
        if self._writes:
            self._writes = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Context that dispatches `step`; TensorBoard shows what is in it as one step."""
        if not self._writes:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
