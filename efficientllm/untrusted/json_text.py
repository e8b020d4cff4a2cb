"""JSON that others wrote: of limited size, depth and digits, and of text that can be printed.

Python's own reader raises RecursionError for a deep nest and ValueError for a number of many digits, takes NaN, and
makes strings of half a surrogate pair, which no file can hold; others' readers (pyarrow's, pandas') crash on a nest.
"""

import json
import math
import re

from efficientllm.errors import UserError, shown
from efficientllm.untrusted import files

DEPTH = 64
DIGITS = 40  # of a whole number: any of 64 bits has 20
_STRING_OR_BRACKET = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]'
_TOKENS = {
    str: re.compile(_STRING_OR_BRACKET, re.DOTALL),
    bytes: re.compile(_STRING_OR_BRACKET.encode(), re.DOTALL),
}
_BRACKETS, _CLOSING = {str: ("[", "{"), bytes: (b"[", b"{")}, {str: ("]", "}"), bytes: (b"]", b"}")}
_NAMES = {dict: "an object", list: "a list", str: "a text"}


def read(path, kind=dict, where=None, most=files.MOST, unique=False, nan=False):
    """What a JSON file holds, of type `kind` (None: any). Raises UserError beginning with `where`, or the path."""
    return parse(files.read_text(path, most, where), where or str(path), kind, unique, nan)


def parse(text, where, kind=dict, unique=False, nan=False):
    """What a JSON text, str or bytes, holds: of type `kind` (None: any).

    Infinity is taken, which config.json files of Mamba hold; NaN is not, but for `nan`. With `unique`, an object that
    names a key twice is refused. Raises UserError beginning with `where`.
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
    except ValueError as error:  # of ours, and bytes that are not UTF-8
        raise UserError(f"{where}: not JSON that can be read ({error})") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{where}: holds {shown(value)}, where {_NAMES.get(kind, kind)} is needed")
    return value


def field(value, path, kind, where):
    """What `path`, "a.b", names in an object of objects. `kind` is a type, or "number": finite, and no bool.

    Raises UserError beginning with `where` for what is not there or of another type.
    """
    found = value
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    right = is_number(found) if kind == "number" else isinstance(found, kind)
    if not right:
        wanted = "a finite number" if kind == "number" else _NAMES.get(kind, kind.__name__)
        raise UserError(f"{where}: {path} = {shown(found)}, where {wanted} is needed")
    return found


def is_number(value):
    """Whether a value is a finite number that a float holds, and no bool."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_deep(text, most=DEPTH):
    """Whether a JSON text, str or bytes, nests deeper than `most`; one that is no JSON, as far as its brackets say so.

    Fast where there are few brackets in all.
    """
    kind = type(text)
    if text.count(_BRACKETS[kind][0]) + text.count(_BRACKETS[kind][1]) <= most:
        return False
    depth = 0
    for found in _TOKENS[kind].finditer(text):
        first = found[0][:1]
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
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} stands in it twice")
    return found


def _check(value):
    """Raises ValueError for a nest that is too deep, and for text that is none."""
    level = [value]
    for _ in range(DEPTH + 1):
        inner = []
        for held in level:
            if isinstance(held, dict):
                inner += held.keys()
                inner += held.values()
            elif isinstance(held, list):
                inner += held
            elif isinstance(held, str) and not held.isascii():
                _check_text(held)
        if not inner:
            return
        level = inner
    raise ValueError(f"nested deeper than {DEPTH}")


def _check_text(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} has half of a surrogate pair, which is no character") from None
