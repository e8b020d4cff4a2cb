"""The protocol of a checkpoint's tensors: what loading, conversion and reports ask of a reader of any format."""

import pathlib
import typing

import numpy as np

if typing.TYPE_CHECKING:
    from efficientllm.model import Backbone


class TensorReader:
    """Tensors by name, read on demand. A subclass sets `where` and `shapes` and defines `dtype` and `read`."""

    where: pathlib.Path
    shapes: dict[str, tuple[int, ...]]
    # Whether names are our own parameter paths, which `bind` maps, rather than those of a name table.
    has_own_paths = False
    # The Jinja chat template that the file itself holds.
    chat_template: str | None = None

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns."""
        raise NotImplementedError(f"{type(self).__name__} defines no dtype(name)")

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, dequantized."""
        raise NotImplementedError(f"{type(self).__name__} defines no read(name)")

    def stored(self, name: str) -> typing.Any:
        """The quantized leaf of a tensor, in numpy, or None."""
        return None

    def form(self, name: str) -> str | None:
        """The stored format of a tensor, such as `Q4_1`; None where config.json names the format of all."""
        return None

    def bind(self, lm: "Backbone") -> dict[str, typing.Any]:
        """`{our path: leaf}` of all parameters of `lm`, where `has_own_paths`."""
        raise NotImplementedError(f"{type(self).__name__} has the names of a table")
