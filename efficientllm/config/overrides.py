"""Values of `--config.key=value`: texts read as what the key holds."""

import ast
import warnings

from ml_collections import ConfigDict

from efficientllm.config import schema
from efficientllm.errors import UserError, shown
from efficientllm.registry import ranges

WORDS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}


def apply(config, overrides):
    """Sets keys of `config` to what `overrides`, pairs of (`config.key`, text), say; the last one of a key counts.

    A tuple that is given as several texts has all of them. Raises UserError.
    """
    texts = {}
    for path, text in overrides:
        texts.setdefault(path, []).append(text)
    for path, given in texts.items():
        group, key = _find(config, path, given[-1])
        default = group[key]
        parts = given if isinstance(default, tuple) and len(given) > 1 else given[-1:]
        values = [_read(path, text, default) for text in parts]
        group[key] = sum(values, ()) if isinstance(default, tuple) else values[-1]


def _find(config, path, text):
    """`(group, key)` of a key of the config. Raises UserError for one that it has not."""
    flag = f"--{path}" if text is None or isinstance(text, bool) else f"--{path}={text}"
    *parents, key = path.split(".")[1:]
    group = config
    for parent in parents:
        group = group[parent] if isinstance(group, ConfigDict) and parent in group else None
    if not isinstance(group, ConfigDict) or key not in group:
        raise UserError(schema.unknown(path).replace(path, flag, 1))
    if isinstance(group[key], ConfigDict):
        raise UserError(f"{flag}: {path} is a group of keys; set one, such as --{path}.{next(iter(group[key]))}=...")
    return group, key


def _read(path, text, default):
    """The value that `text` is, of the type of `default`."""
    if isinstance(default, bool):
        word = text if isinstance(text, bool) or text is None else WORDS.get(text.lower(), text)
        return True if word is None else schema.typed(path, word, default)
    if text is None or isinstance(text, bool):
        raise UserError(f"--{path} needs a value: --{path}={shown(default) if isinstance(default, str) else default}")
    if isinstance(default, tuple):
        return _tuple(path, text)
    if isinstance(default, str):
        return text
    try:
        return _int(text) if isinstance(default, int) else float(text)
    except ValueError:
        allowed = ranges.KEYS[path.removeprefix("config.")]
        raise UserError(f"{path} = {shown(text)}: must be {allowed}{_hint(text)}") from None


def _int(text):
    return int(text, 0 if text.lower().startswith(("0x", "0o", "0b")) else 10)


def _hint(text):
    """`; write 1000` for 1e3."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f"; write {number:.0f}" if number.is_integer() and abs(number) < 1e15 else ""


def _tuple(path, text):
    """A tuple or list as Python writes it, or any other text as the one element; no text is no element."""
    if not text:
        return ()
    try:
        with warnings.catch_warnings():  # a regex is no wrong escape
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = None
        if text.lstrip().startswith(("(", "[")):
            raise UserError(f"{path} = {shown(text)}: is no tuple; write quotes around each text: ('a', 'b')") from None
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,) if isinstance(value, str) else (text,)
