"""Renames the tensors of checkpoints saved from the backbone class, whose names lack the head class's prefix."""

import functools
import typing
from collections.abc import Sequence


class RenamedTensors:
    """Tensors of a file under other names; `names` is `{name here: name in the file}`."""

    def __init__(self, tensors: typing.Any, names: dict[str, str]):
        self._tensors, self._names = tensors, names
        self.shapes = {name: tensors.shapes[stored_name] for name, stored_name in names.items()}

    def __getattr__(self, method):
        call = getattr(self._tensors, method)
        if method not in ("dtype", "read", "stored", "form"):
            return call
        return functools.wraps(call)(lambda name: call(self._names[name]))


def add_prefix(tensors: typing.Any, table: dict[str, tuple], heads: Sequence[str]) -> typing.Any:
    """Adds the prefix of `table`'s embedding to the tensors' names if the file lacks it, as transformers does."""
    embedding = next(name for name, (parts, _) in table.items() if parts == ("embedding",))
    prefix, dot, rest = embedding.partition(".")
    if embedding in tensors.shapes or rest not in tensors.shapes:
        return tensors
    return RenamedTensors(tensors, {name if name in heads else prefix + dot + name: name for name in tensors.shapes})
