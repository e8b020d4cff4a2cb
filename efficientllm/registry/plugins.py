"""Plugins: imports the user's own techniques (`config.imports`), and locates an error in the user's code."""

import importlib
import importlib.util
import pathlib
import sys
import sysconfig
import traceback
import types
import typing
import zlib

from efficientllm.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]
_LIBRARIES = tuple(str(pathlib.Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))


def import_plugins(imports: typing.Iterable[str]) -> None:
    """Imports each module name, or path of a Python file, of `config.imports`. Raises UserError."""
    for name in imports:
        try:
            if name.endswith(".py"):
                import_file(pathlib.Path(name))
            else:
                importlib.import_module(name)
        except UserError:
            raise
        except (ImportError, OSError, SyntaxError) as error:
            raise UserError(f"config.imports = {name!r}: cannot be imported: {' '.join(str(error).split())}") from None
        except (Exception, SystemExit) as error:
            raise UserError(f"config.imports = {name!r}: cannot be imported: {one_line_with_location(error)}") from None


def import_file(path: pathlib.Path) -> types.ModuleType:
    """Imports the Python file at `path` as a module, once."""
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


def one_line_with_location(error: BaseException) -> str:
    """The error as `ZeroDivisionError: division by zero (mine.py:12, in __call__)`."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]} ({error_location(error)})"


def error_location(error: BaseException) -> str:
    """Where an error was raised, `file:line, in function`.

    Of the innermost frame in the user's code, else in this package, else anywhere.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    if not frames:
        return "no traceback"
    package = [index for index, frame in enumerate(frames) if pathlib.Path(frame.filename).is_relative_to(_PACKAGE)]
    # Frames before the first of this package belong to whoever called it, a test runner for example.
    users = [index for index in range(min(package, default=0), len(frames)) if _is_users(frames[index].filename)]
    frame = frames[(users or package or [-1])[-1]]
    return f"{_shown(frame.filename)}:{frame.lineno}, in {frame.name}"


def _is_users(filename):
    path = pathlib.Path(filename)
    if path.suffix != ".py" or not path.exists() or path.is_relative_to(_PACKAGE):
        return False
    return not str(path.resolve()).startswith(_LIBRARIES)


def _shown(filename):
    path, here = pathlib.Path(filename), pathlib.Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
