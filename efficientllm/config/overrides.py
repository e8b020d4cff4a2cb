"""Overrides `--config.key=value`: parses each text as the type of its key and sets it."""

import ast
import typing
import warnings

from ml_collections import ConfigDict

from efficientllm.config import key_ranges, schema
from efficientllm.errors import UserError, short_repr

WORDS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}


def apply(config: ConfigDict, overrides: typing.Iterable[tuple[str, typing.Any]]) -> None:
    """Sets keys of `config` from pairs of (`config.key`, text). The last pair of a key counts.

    A tuple that is set several times is the concatenation. Raises UserError.
    """
    texts: dict[str, list] = {}
    for path, text in overrides:
        texts.setdefault(path, []).append(text)
    for path, key_texts in texts.items():
        group, key = _find_key(config, path, key_texts[-1])
        default = group[key]
        if isinstance(default, tuple):
            group[key] = sum((_parse_value(path, text, default) for text in key_texts), ())
        else:
            group[key] = _parse_value(path, key_texts[-1], default)


def _find_key(config, path, text):
    """The group of `config` that holds the key `path`, and the key in it. Raises UserError if there is none."""
    flag = f"--{path}" if text is None or isinstance(text, bool) else f"--{path}={text}"
    *parents, key = path.split(".")[1:]
    group = config
    for parent in parents:
        group = group[parent] if isinstance(group, ConfigDict) and parent in group else None
    if not isinstance(group, ConfigDict) or key not in group:
        raise UserError(schema.unknown_key(path).replace(path, flag, 1))
    if isinstance(group[key], ConfigDict):
        raise UserError(f"{flag}: {path} is a group of keys; set one, such as --{path}.{next(iter(group[key]))}=...")
    return group, key


def _parse_value(path, text, default):
    """`text` as a value of the type of `default`. Raises UserError."""
    if isinstance(default, bool):
        word = text if isinstance(text, bool) or text is None else WORDS.get(text.lower(), text)
        return True if word is None else schema.convert_type(path, word, default)
    if text is None or isinstance(text, bool):
        example = short_repr(default) if isinstance(default, str) else default
        raise UserError(f"--{path}: needs a value, such as --{path}={example}")
    if isinstance(default, tuple):
        return _parse_tuple(path, text)
    if isinstance(default, str):
        return text
    try:
        return _parse_int(text) if isinstance(default, int) else float(text)
    except ValueError:
        allowed = key_ranges.KEYS[path.removeprefix("config.")]
        raise UserError(f"{path} = {short_repr(text)}: must be {allowed}{_whole_hint(text)}") from None


def _parse_int(text):
    return int(text, 0 if text.lower().startswith(("0x", "0o", "0b")) else 10)


def _whole_hint(text):
    """`; write 1000` for the text `1e3`, else nothing."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f"; write {number:.0f}" if number.is_integer() and abs(number) < 1e15 else ""


def _parse_tuple(path, text):
    """A tuple or list in Python's syntax, or any other text as its only element. An empty text is the empty tuple."""
    if not text:
        return ()
    try:
        with warnings.catch_warnings():  # a regex holds escapes that Python warns about
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = None
        if text.lstrip().startswith(("(", "[")):
            raise UserError(
                f"{path} = {short_repr(text)}: is not a tuple; write quotes around each text: ('a', 'b')"
            ) from None
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,) if isinstance(value, str) else (text,)
