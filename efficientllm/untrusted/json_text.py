"""Safe JSON parser: limits size, depth and digits, and refuses strings that cannot be encoded.

Python's parser raises RecursionError for deep nesting and ValueError for a number of many digits, accepts NaN, and
returns strings with lone surrogates, which no file can hold. The parsers of pyarrow and pandas crash on deep nesting.
"""

import json
import math
import re
import typing

from efficientllm.errors import UserError, short_repr
from efficientllm.typing import PathLike
from efficientllm.untrusted import files

DEPTH = 64
DIGITS = 40  # of a whole number; 64 bits have 20
_STRING_OR_BRACKET = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]'
_TOKENS: dict[type, re.Pattern] = {
    str: re.compile(_STRING_OR_BRACKET, re.DOTALL),
    bytes: re.compile(_STRING_OR_BRACKET.encode(), re.DOTALL),
}
_BRACKETS: dict[type, tuple] = {str: ("[", "{"), bytes: (b"[", b"{")}
_CLOSING: dict[type, tuple] = {str: ("]", "}"), bytes: (b"]", b"}")}
_NAMES: dict[typing.Any, str] = {dict: "an object", list: "a list", str: "a text"}


def read(
    path: PathLike,
    kind: type | None = dict,
    where: str | None = None,
    most: int = files.MOST,
    unique: bool = False,
    nan: bool = False,
) -> typing.Any:
    """Reads a JSON file whose value is of type `kind` (None: any). Raises UserError, `where: ...`."""
    return parse(files.read_text(path, most, where), where or str(path), kind, unique, nan)


def parse(
    text: str | bytes, where: str, kind: type | None = dict, unique: bool = False, nan: bool = False
) -> typing.Any:
    """Parses a JSON text whose value is of type `kind` (None: any).

    Accepts Infinity, which config.json files of Mamba hold, and NaN only with `nan`. With `unique`, refuses an object
    with a repeated key. Raises UserError that begins with `where`.
    """
    try:
        value = json.loads(
            text,
            parse_int=_whole,
            parse_constant=float if nan else _constant,
            object_pairs_hook=_unique if unique else None,
        )
        _check(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}: line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested deeper than {DEPTH}") from None
    except ValueError as error:  # raised by the hooks above, or for bytes that are not UTF-8
        raise UserError(f"{where}: not JSON that can be read ({error})") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{where}: holds {short_repr(value)}; {_NAMES.get(kind, kind)} is needed")
    return value


def field(value: typing.Any, path: str, kind: typing.Any, where: str) -> typing.Any:
    """The value at `path`, such as "a.b", in nested objects. `kind` is a type, or "number": finite, and not a bool.

    Raises UserError that begins with `where` for a missing value or another type.
    """
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not (is_number(value) if kind == "number" else isinstance(value, kind)):
        type_name = "a finite number" if kind == "number" else _NAMES.get(kind, kind.__name__)
        raise UserError(f"{where}: {path} = {short_repr(value)}: {type_name} is needed")
    return value


def is_number(value: typing.Any) -> bool:
    """Whether a value is a finite number within the range of a float, and not a bool."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_deep(text: str | bytes, most: int = DEPTH) -> bool:
    """Whether a JSON text nests deeper than `most`, judged by its brackets outside of strings.

    Fast if there are few brackets. The text need not be valid JSON.
    """
    kind = type(text)
    if text.count(_BRACKETS[kind][0]) + text.count(_BRACKETS[kind][1]) <= most:
        return False
    depth = 0
    for token in _TOKENS[kind].finditer(text):
        first = token[0][:1]
        depth += (first in _BRACKETS[kind]) - (first in _CLOSING[kind])
        if depth > most:
            return True
    return False


def _whole(digits):
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _constant(name):
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def _unique(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{short_repr(next(name for name in names if names.count(name) > 1))} is a repeated key")
    return value


def _check(value):
    """Raises ValueError for nesting that is too deep, and for strings with lone surrogates."""
    level = [value]
    for _ in range(DEPTH + 1):
        next_level = []
        for item in level:
            if isinstance(item, dict):
                next_level += item.keys()
                next_level += item.values()
            elif isinstance(item, list):
                next_level += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
        if not next_level:
            return
        level = next_level
    raise ValueError(f"nested deeper than {DEPTH}")


def _check_text(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{short_repr(text)} has half of a surrogate pair, which is no character") from None
