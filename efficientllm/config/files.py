"""Config files: found by path or by the name of a preset, run, and written anew for a start."""

import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback

from efficientllm.config import presets
from efficientllm.errors import UserError, did_you_mean, one_line
from efficientllm.untrusted.files import is_file

# What ml_collections says of a value of another type.
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


def load(argument):
    """What `get_config` of `FILE[:ARG]` returns; FILE is a Python file or the name of a preset. Raises UserError."""
    file, name, is_preset = find(argument)
    where = f"--config={argument}"
    if not is_preset:
        _find_neighbours(file)
    get_config = getattr(run(file, where), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{where}: {file} has no function get_config()")
    arguments = () if name is None else (name,)
    _check_arguments(get_config, arguments, where)
    return guarded(file, where, lambda: get_config(*arguments))


def find(argument):
    """`(file, ARG or None, whether it is a preset)` of `FILE[:ARG]`. Raises UserError for a file that is not there."""
    if is_file(argument) and argument.endswith(".py"):  # a colon may be part of a path
        return pathlib.Path(argument), None, False
    text, colon, name = argument.partition(":")
    name = name if colon else None
    if is_file(text) and text.endswith(".py"):
        return pathlib.Path(text), name, False
    path = pathlib.PurePath(text)
    is_named = path.parent.name in ("", "configs") and path.suffix in ("", ".py")
    if is_named and not path.is_absolute() and (preset := presets.find(path.stem)):
        return preset, name, True
    raise UserError(_missing(text, path))


def _missing(text, path):
    if is_file(text):
        return f"--config={text}: is no Python file; its name must end in .py"
    if os.path.isdir(text):
        return f"--config={text}: is a folder; name a Python file in it"
    if os.path.lexists(text) and not os.path.exists(text):
        return f"--config={text}: is a link to a file that is not there"
    try:
        near = [str(file) for file in pathlib.Path(path.parent).glob("*.py")]
    except (OSError, ValueError):
        near = []
    hint = did_you_mean(text, near) or did_you_mean(path.stem, presets.names())
    return f"--config={text}: no such file{hint}; presets: {', '.join(presets.names())}"


def _find_neighbours(file):
    """Lets a config file import its neighbours from anywhere, and the presets as `configs` outside a checkout."""
    for folder in (str(file.resolve().parent.parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if "configs" not in sys.modules and importlib.util.find_spec("configs") is None:
        sys.modules["configs"] = presets


def run(file, where):
    """The module of a Python file, run anew. Raises UserError, `where: ...`, for whatever it raises."""
    spec = importlib.util.spec_from_file_location("efficientllm_config", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a file rewritten within a second is another one
    try:
        guarded(file, where, lambda: spec.loader.exec_module(module))
    finally:
        sys.dont_write_bytecode = before
    return module


def guarded(file, where, function):
    """`function()`, code of the config file `file`; what it raises is a UserError that names its line."""
    try:
        return function()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except SyntaxError as error:
        line = "" if error.lineno is None else f", line {error.lineno}"
        raise UserError(f"{where}: {error.filename or file}{line}: SyntaxError: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_place(error, file)}: {_described(error)}") from None


def _place(error, file):
    """The file and the line of the innermost frame that is no library's: the config file's, or a neighbour's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}, line {frames[-1].lineno}" if frames else str(file)


def _described(error):
    if isinstance(error, SystemExit):
        return f"it ends the program (SystemExit: {error.code})"
    if match := _OTHER_TYPE.match(str(error)):
        key, value, given, wanted = match.groups()
        return f"{key} = {value}: must be {wanted}, not {given}"
    return one_line(error)


def _check_arguments(get_config, arguments, where):
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise UserError(f"{where}: its get_config() takes no name; leave :{arguments[0]} out") from None
        raise UserError(f"{where}: its get_config needs a name; write {where}:NAME") from None
    except ValueError:  # a callable without a signature
        pass


def write_start(folder):
    """Writes a config to start from into `folder` -> its path; never over another. Raises UserError."""
    file = pathlib.Path(folder) / "config.py"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(START)
    except FileExistsError:
        raise UserError(f"--init={folder}: {file} is there already; name another folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--init={folder}: cannot be written ({one_line(error)})") from None
    return file
