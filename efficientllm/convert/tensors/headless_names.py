"""Renames the tensors of checkpoints saved from the backbone class, whose names lack the head class's prefix."""

import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.convert.tensors.tensor_reader import TensorReader


class RenamedTensors(TensorReader):
    """Tensors of a file under other names; `names` is `{name here: name in the file}`."""

    def __init__(self, tensors: TensorReader, names: dict[str, str]):
        self._tensors, self._names, self.where = tensors, names, tensors.where
        self.shapes = {name: tensors.shapes[stored_name] for name, stored_name in names.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of the tensor that the file has under its own name."""
        return self._tensors.dtype(self._names[name])

    def read(self, name: str) -> np.ndarray:
        """Reads the tensor that the file has under its own name."""
        return self._tensors.read(self._names[name])

    def stored(self, name: str) -> typing.Any:
        """The quantized leaf of the tensor, or None."""
        return self._tensors.stored(self._names[name])

    def form(self, name: str) -> str | None:
        """The stored format of the tensor, or None."""
        return self._tensors.form(self._names[name])


def add_prefix(tensors: TensorReader, table: dict[str, tuple], heads: Sequence[str]) -> TensorReader:
    """Adds the prefix of `table`'s embedding to the tensors' names if the file lacks it, as transformers does."""
    embedding = next(name for name, (parameters, _) in table.items() if parameters == ("embedding",))
    prefix, dot, rest = embedding.partition(".")
    if embedding in tensors.shapes or rest not in tensors.shapes:
        return tensors
    return RenamedTensors(tensors, {name if name in heads else prefix + dot + name: name for name in tensors.shapes})
