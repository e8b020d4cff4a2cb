"""From a config to a finished workdir: imports, task, exit status."""

import hashlib
import pathlib
import sys

import jax

from efficientllm import registry
from efficientllm.config import schema
from efficientllm.errors import UserError
from efficientllm.record.workdir import Workdir
from efficientllm.registry.plugins import import_plugins
from efficientllm.runtime import distributed, stopping
from efficientllm.tasks.base import Run


def run(config, path=None, overwrite=False):
    """Runs `config.task` in its workdir and returns the exit status. Raises UserError for a bad config or input."""
    config = schema.validate_config(config)
    distributed.initialise()
    with distributed.exits_with_job():
        return _run(config, path, overwrite)


def _run(config, path, overwrite):
    task = distributed.call_in_all(lambda: _task(config))
    if hasattr(task, "before_devices"):
        task.before_devices(config)
    # The main process makes the folder, and owns it, before another looks at it.
    made = distributed.call_in_all(
        lambda: Workdir(config, path, overwrite).acquire() if distributed.is_main() else None
    )
    refused = True
    try:
        workdir = distributed.call_in_all(lambda: made or Workdir(config, path, overwrite))
        workdir.code = code_of(config.imports)
        answers = distributed.gather(distributed.call_in_all(lambda: workdir.answer(config) if made else None))
        status = _say(answers[0]) if answers[0] else _guarded(task, config, workdir)
        refused = False
        return status
    finally:
        if made:
            made.release(refused)


def _say(answer):
    if distributed.is_main():
        print(answer)
    return 0


def _guarded(task, config, workdir):
    """The task's exit status; an exception that it does not know is a row and one line, and its status 3."""
    failed = Run(config, workdir)
    stopping.raise_if_stopped()
    try:
        return task(config, workdir)
    except UserError:
        raise
    except Exception as error:
        stopping.raise_if_stopped()  # of which it may have been made
        if distributed.is_multi_process() and isinstance(error, jax.errors.JaxRuntimeError):
            raise  # as where another process has died
        return distributed.exit_process(failed.end(error))


def _task(config):
    import_plugins(config.imports)
    return registry.lookup("task", config.task, where="config.task")


def code_of(imports):
    """`{name: twelve hex digits}` of the content of each file of `config.imports`."""
    files = {
        name: name if name.endswith(".py") else getattr(sys.modules.get(name), "__file__", None) for name in imports
    }
    return {
        name: hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()[:12] for name, file in files.items() if file
    }
