"""Config files: finds one by path or preset name, runs it, and writes a new one to start from."""

import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
import typing

from efficientllm.config import presets
from efficientllm.errors import UserError, did_you_mean, one_line
from efficientllm.typing import Config
from efficientllm.untrusted.files import is_file

# The message of ml_collections for a value of another type.
_OTHER_TYPE = re.compile(
    r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '(.*)'> and cannot be casted to "
    r"type <class '(.*)'>",
    re.DOTALL,
)
START = '''"""My config: its differences from the base config. Every key is in efficientllm/base_config.py."""

from efficientllm import base_config


def get_config():
    config = base_config.get_config()
    config.name = "mine"
    config.model.mixer = "gqa"
    config.model.ffn = "swiglu"
    config.data = "python_docs()"  # or text(path='my_texts/**')
    config.train.steps = 200
    return config
'''


def load(argument: str) -> Config:
    """Calls `get_config` of `FILE[:ARG]`, where FILE is a Python file or the name of a preset. Raises UserError."""
    file, variant, is_preset = find_config(argument)
    where = f"--config={argument}"
    if not is_preset:
        _make_neighbours_importable(file)
    get_config = getattr(run_file(file, where), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{where}: {file} has no function get_config()")
    arguments = () if variant is None else (variant,)
    _check_arguments(get_config, arguments, where)
    return guarded(file, where, lambda: get_config(*arguments))


def find_config(argument: str) -> tuple[pathlib.Path, str | None, bool]:
    """Splits `FILE[:ARG]` into `(file, ARG or None, whether it is a preset)`. Raises UserError for a missing file."""
    if is_file(argument) and argument.endswith(".py"):  # a colon may be part of a path
        return pathlib.Path(argument), None, False
    text, colon, variant = argument.partition(":")
    variant = variant if colon else None
    if is_file(text) and text.endswith(".py"):
        return pathlib.Path(text), variant, False
    path = pathlib.PurePath(text)
    is_named = path.parent.name in ("", "configs") and path.suffix in ("", ".py")
    if is_named and not path.is_absolute() and (preset := presets.find(path.stem)):
        return preset, variant, True
    raise UserError(_why_missing(text, path))


def _why_missing(text, path):
    if is_file(text):
        return f"--config={text}: is not a Python file; its name must end in .py"
    if os.path.isdir(text):
        return f"--config={text}: is a folder; name a Python file in it"
    if os.path.lexists(text) and not os.path.exists(text):
        return f"--config={text}: is a link to a file that is not there"
    try:
        neighbours = [str(file) for file in pathlib.Path(path.parent).glob("*.py")]
    except (OSError, ValueError):
        neighbours = []
    hint = did_you_mean(text, neighbours) or did_you_mean(path.stem, presets.names())
    return f"--config={text}: no such file{hint}; presets: {', '.join(presets.names())}"


def _make_neighbours_importable(file):
    """Lets a config file import its neighbours, and outside a checkout the presets as `configs`."""
    for folder in (str(file.resolve().parent.parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if "configs" not in sys.modules and importlib.util.find_spec("configs") is None:
        sys.modules["configs"] = presets


def run_file(file: pathlib.Path, where: str) -> types.ModuleType:
    """Runs a Python file as a new module. Raises UserError, `where: ...`, for whatever it raises."""
    spec = importlib.util.spec_from_file_location("efficientllm_config", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # A file that is rewritten within a second would match the bytecode of its old text.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        guarded(file, where, lambda: spec.loader.exec_module(module))
    finally:
        sys.dont_write_bytecode = before
    return module


def guarded(file: pathlib.Path, where: str, function: typing.Callable[[], typing.Any]) -> typing.Any:
    """Calls `function`, code of the config file `file`. Whatever it raises becomes a UserError that names the line."""
    try:
        return function()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except SyntaxError as error:
        line = "" if error.lineno is None else f", line {error.lineno}"
        raise UserError(f"{where}: {error.filename or file}{line}: SyntaxError: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_line_of(error, file)}: {_describe_error(error)}") from None


def _line_of(error, file):
    """The innermost line of the config file in an error's traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}, line {frames[-1].lineno}" if frames else str(file)


def _describe_error(error):
    if isinstance(error, SystemExit):
        return f"it ends the program (SystemExit: {error.code})"
    if match := _OTHER_TYPE.match(str(error)):
        key, value, actual_type, type_name = match.groups()
        return f"{key} = {value}: must be {type_name}, not {actual_type}"
    return one_line(error)


def _check_arguments(get_config, arguments, where):
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise UserError(f"{where}: its get_config() takes no name; leave :{arguments[0]} out") from None
        raise UserError(f"{where}: its get_config needs a name; write {where}:NAME") from None
    except ValueError:  # a callable that Python cannot inspect: it is called and may raise
        pass


def write_start(folder: str) -> pathlib.Path:
    """Writes `folder/config.py`, a config to start from, and returns its path.

    Raises UserError if the file exists or cannot be written.
    """
    file = pathlib.Path(folder) / "config.py"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "x", encoding="utf-8") as output:
            output.write(START)
    except FileExistsError:
        raise UserError(f"--init={folder}: {file} exists; name another folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--init={folder}: cannot be written ({one_line(error)})") from None
    return file
