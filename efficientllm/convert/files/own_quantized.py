"""Reader of the quantized checkpoints that `write_quantized` writes: arrays of our leaves in safetensors.

Tensors have our parameter paths with unrolled layers; config.json's `quantization_config` states the leaf class of each
path.
"""

import dataclasses
import functools
import pathlib
import typing

import flax.linen as nn
import flax.traverse_util
import numpy as np

from efficientllm import model as models
from efficientllm.convert.files.safetensors_file import SafetensorsFolder
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError, short_repr
from efficientllm.quant import consistency
from efficientllm.quant.base import Rows
from efficientllm.registry import lookup, names

METHOD = "efficientllm"


def leaf_types() -> dict[str, type]:
    """`{name: class}` of the leaves that registered quantizers produce."""
    forms = [getattr(form, "func", form) for form in (lookup("quant", name) for name in names("quant"))]
    kinds: set[typing.Any] = {
        form.leaf_type for form in forms if form.leaf_type is not None and dataclasses.is_dataclass(form.leaf_type)
    }
    return {kind.__name__: kind for kind in kinds}


class OwnQuantizedFolder(TensorReader):
    """Reads a folder of our quantized format, by parameter path.

    Raises UserError naming what `quantization_config` or the files lack.
    """

    has_own_paths = True

    def __init__(self, path: pathlib.Path, quantization: dict[str, typing.Any]):
        self.where, self._files, self._leaves = path, SafetensorsFolder(path), quantization.get("leaves")
        self._kinds = leaf_types()
        kinds = self._leaves.values() if isinstance(self._leaves, dict) else [None]
        for description in kinds:
            if not isinstance(description, dict) or str(description.get("leaf")) not in self._kinds:
                raise UserError(
                    f"{path / 'config.json'}: quantization_config.leaves holds {short_repr(description)}, "
                    "not a leaf class"
                )
        self.shapes = {name: shape for name, shape in self._files.shapes.items() if "." not in name}
        self.shapes |= {path: self.leaf(path).shape for path in self._leaves}

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype; float32 for quantized leaves."""
        return np.dtype(np.float32) if name in self._leaves else self._files.dtype(name)

    def leaf(self, path: str) -> typing.Any:
        """Reads the leaf at a path, in numpy; a plain array if it is not quantized."""
        if path not in self._leaves:
            return self._files.read(path)
        statics = dict(self._leaves[path])
        kind = self._kinds[statics.pop("leaf")]
        pairs = (name.rpartition(".") for name in self._files.shapes)
        fields = {field for leaf_path, dot, field in pairs if dot and leaf_path == path}
        try:
            leaf = kind(**statics, **{name: self._files.read(f"{path}.{name}") for name in fields})
            leaf.check()
        except (TypeError, UserError) as error:
            raise UserError(f"{self.where}: {path!r} is no {kind.__name__}: {error}") from None
        return leaf

    def finite_leaf(self, path: str) -> typing.Any:
        """Reads the leaf at a path and its scales. Raises UserError for a scale that is not finite."""
        leaf = self.leaf(path)
        if path in self._leaves:
            try:
                consistency.check_finite(leaf)
            except UserError as error:
                raise UserError(f"{self.where}: {path!r}: {error}") from None
        return leaf

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def read(self, path: str) -> np.ndarray:
        """Reads the array at a path, dequantized to float32."""
        leaf = self.finite_leaf(path)
        return np.asarray(leaf.dense()) if path in self._leaves else leaf

    def bind(self, lm: models.Backbone) -> "dict[str, Leaf]":
        """Like `bind_parameters`, for these files; also checks that every array belongs to a leaf."""
        leaves = bind_parameters(self, lm)
        for name in self._files.shapes:
            if "." in name and (leaf_path := name.rpartition(".")[0]) not in self._leaves:
                raise UserError(f"{self.where}: {name!r} is of {leaf_path!r}, which quantization_config.leaves lacks")
        return leaves


def bind_parameters(tensors: typing.Any, lm: models.Backbone) -> "dict[str, Leaf]":
    """`{path: Leaf}` of all parameters of `lm` in `tensors`, under our own paths.

    Raises UserError for a parameter that is missing, has a wrong shape, or is unknown.
    """
    shapes = flax.traverse_util.flatten_dict(nn.unbox(models.abstract_params(lm)), sep="/")
    leaves = {path: Leaf(path, leaf.shape, lm.stacks.unrolled_paths(path)) for path, leaf in shapes.items()}
    expected = {name: leaf.shape[name != leaf.path :] for leaf in leaves.values() for name in leaf.names}
    for name, shape in expected.items():
        stored = tensors.shapes.get(name)
        if stored is None or tuple(stored) != tuple(shape):
            state = "missing" if stored is None else f"of shape {list(stored)}"
            raise UserError(f"{tensors.where}: {name!r} is {state}, the config asks for {list(shape)}")
    if extra := sorted(tensors.shapes.keys() - expected.keys()):
        raise UserError(f"{tensors.where}: {extra[0]!r} belongs to nothing in the model that the config describes")
    return leaves


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter in our own files; the counterpart of `parameter_map.Leaf`."""

    path: str
    shape: tuple[int, ...]
    names: list[str]

    def read(self, tensors: typing.Any, index: tuple[slice, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """Reads the slice `index` of the parameter in `dtype`."""
        if self.names == [self.path]:
            return np.asarray(tensors.read(self.path)[index], dtype)
        paths = self.names[index[0]]
        return np.stack([np.asarray(tensors.read(name)[index[1:]], dtype) for name in paths])

    def stored(self, tensors: typing.Any) -> typing.Any:
        """The quantized leaf; None if it is not quantized or layers are stacked."""
        leaf = tensors.finite_leaf(self.path) if self.names == [self.path] else None
        return leaf if isinstance(leaf, Rows) else None
