"""Runs a config's task in its workdir: imports, workdir, task, exit status."""

import hashlib
import pathlib
import sys
from collections.abc import Sequence

import jax

from efficientllm import registry
from efficientllm.config import schema
from efficientllm.config.field_keys import name_keys
from efficientllm.errors import UserError
from efficientllm.record.workdir import Workdir
from efficientllm.registry.plugins import import_plugins
from efficientllm.runtime import compile_cache, distributed, stopping
from efficientllm.tasks.base import Run
from efficientllm.typing import Config, PathLike


def run(config: Config, path: PathLike | None = None, overwrite: bool = False) -> int:
    """Runs `config.task` in its workdir and returns the exit status. Raises UserError for a bad config or input."""
    # The command line has checked its config, before JAX is imported. A program that calls this function has not.
    config = schema.validate_config(config)
    distributed.initialise()
    shows_names = config.task == "plan" or bool(config.profile.steps)
    with (
        distributed.exits_with_job(),
        name_keys(config),
        compile_cache.of_run(config.compile_cache, by_names=shows_names),
    ):
        return _run(config, path, overwrite)


def _run(config, path, overwrite):
    task = distributed.call_in_all(lambda: _task(config))
    task.before_devices(config)
    # The main process creates and locks the folder before another process reads it.
    owned_workdir = distributed.call_in_all(
        lambda: Workdir(config, path, overwrite).acquire() if distributed.is_main() else None
    )
    refused = True
    try:
        workdir = distributed.call_in_all(lambda: owned_workdir or Workdir(config, path, overwrite))
        workdir.code = code_of(config.imports)
        answers = distributed.gather(distributed.call_in_all(lambda: workdir.answer(config) if owned_workdir else None))
        status = _print_answer(answers[0]) if answers[0] else _run_task(task, config, workdir)
        refused = False
        return status
    finally:
        if owned_workdir:
            owned_workdir.release(refused)


def _print_answer(answer):
    if distributed.is_main():
        print(answer)
    return 0


def _run_task(task, config, workdir):
    """The task's exit status; an unexpected exception becomes a row, a line on stderr and exit status 3."""
    failed = Run(config, workdir)
    stopping.raise_if_stopped()
    try:
        return task.execute(config, workdir)
    except UserError:
        raise
    except Exception as error:
        stopping.raise_if_stopped()  # the error may be a result of the stop
        if distributed.is_multi_process() and isinstance(error, jax.errors.JaxRuntimeError):
            raise  # another process may have died
        return distributed.exit_process(failed.end(error))


def _task(config):
    import_plugins(config.imports)
    task = registry.lookup("task", config.task, where="config.task")
    if not (isinstance(task, type) and issubclass(task, Run)):
        raise UserError(f"config.task = {config.task!r}: is no task; derive it from efficientllm.tasks.base.Run")
    return task


def code_of(imports: Sequence[str]) -> dict[str, str]:
    """Hashes the files of `config.imports` -> `{name: twelve hex digits}`."""
    files = {
        name: name if name.endswith(".py") else getattr(sys.modules.get(name), "__file__", None) for name in imports
    }
    return {
        name: hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()[:12] for name, file in files.items() if file
    }
