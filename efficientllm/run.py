"""From a config to a finished workdir: imports, task, exit status."""

import importlib
import importlib.util
import pathlib
import sys
import zlib

from efficientllm import distributed, registry, schema
from efficientllm.errors import UserError
from efficientllm.workdir import Workdir


def run(config, path=None, overwrite=False):
    """Runs `config.task` in its workdir and returns the exit status. Raises UserError for a bad config or input."""
    config = schema.checked(config)
    distributed.initialise()
    with distributed.leaving():
        return _run(config, path, overwrite)


def _run(config, path, overwrite):
    task = distributed.together(lambda: _task(config))
    if hasattr(task, "before_devices"):
        task.before_devices(config)
    # The main process makes the folder, or empties it, before another looks at it.
    made = distributed.together(lambda: Workdir(config, path, overwrite) if distributed.is_main() else None)
    workdir = distributed.together(lambda: made or Workdir(config, path))
    finished, *_ = distributed.gather(workdir.finished() is not None)
    if finished and not overwrite:
        if distributed.is_main():
            print(f"{workdir.shown} holds a finished run; its row stays. --overwrite starts anew.")
        return 0
    return task(config, workdir)


def _task(config):
    import_plugins(config.imports)
    return registry.lookup("task", config.task, where="config.task")


def import_plugins(imports):
    """Imports each module name, or path of a Python file, of `config.imports`. Raises UserError."""
    for name in imports:
        try:
            if name.endswith(".py"):
                import_file(pathlib.Path(name))
            else:
                importlib.import_module(name)
        except (ImportError, OSError, SyntaxError) as error:
            raise UserError(f"config.imports = {name!r} cannot be imported: {error}") from None


def import_file(path):
    """The module that the Python file at `path` is; imported once."""
    key = f"efficientllm_plugin_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if key in sys.modules:
        return sys.modules[key]
    module_spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[key] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module
