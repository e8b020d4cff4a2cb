"""From a config to a finished workdir: imports, task, exit status."""

import importlib
import importlib.util
import pathlib
import sys

from efficientllm import distributed, registry
from efficientllm.errors import UserError
from efficientllm.workdir import Workdir


def run(config, path=None, overwrite=False):
    """Runs `config.task` in its workdir and returns the exit status. Raises UserError for a bad config or input."""
    import_plugins(config.imports)
    task = registry.lookup("task", config.task, where="config.task")
    distributed.initialise()
    workdir = Workdir(config, path, overwrite and distributed.is_main())
    if workdir.finished() and not overwrite:
        print(f"{workdir.path} holds a finished run; its row stays. --overwrite starts anew.")
        return 0
    return task(config, workdir)


def import_plugins(imports):
    """Imports each module name, or path of a Python file, of `config.imports`. Raises UserError."""
    for name in imports:
        try:
            if name.endswith(".py"):
                _import_file(pathlib.Path(name))
            else:
                importlib.import_module(name)
        except (ImportError, OSError, SyntaxError) as error:
            raise UserError(f"config.imports = {name!r} cannot be imported: {error}") from None


def _import_file(path):
    key = f"efficientllm_plugin_{path.stem}"
    if key in sys.modules:
        return
    module_spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[key] = module
    module_spec.loader.exec_module(module)
