"""Tensors of a file that were saved without the head's class, whose names lack its prefix."""

import functools


class Renamed:
    """Tensors under names that a file does not have: `names` are `{name here: name there}`."""

    def __init__(self, tensors, names):
        self._tensors, self._names = tensors, names
        self.shapes = {name: tensors.shapes[there] for name, there in names.items()}

    def __getattr__(self, method):
        call = getattr(self._tensors, method)
        if method not in ("dtype", "read", "stored", "form"):
            return call
        return functools.wraps(call)(lambda name: call(self._names[name]))


def with_prefix(tensors, table, heads):
    """The tensors under the names of `table`: as they are, or with the prefix of its embedding, as transformers adds it
    to those of a model that was saved without its head."""
    embedding = next(name for name, (parts, _) in table.items() if parts == ("embedding",))
    prefix, dot, rest = embedding.partition(".")
    if embedding in tensors.shapes or rest not in tensors.shapes:
        return tensors
    return Renamed(tensors, {name if name in heads else prefix + dot + name: name for name in tensors.shapes})
