"""Checkpoints of ours whose weights are rounded: the leaves' own arrays in safetensors, bit for bit.

Tensors bear our paths, of layers apart; `quantization_config` of config.json says which leaf the arrays of a path make.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import numpy as np

from efficientllm import model as models
from efficientllm.convert.files.safetensors_file import SafetensorsFolder
from efficientllm.errors import UserError, shown
from efficientllm.quant import consistency
from efficientllm.quant.base import Rows
from efficientllm.registry import lookup, names

METHOD = "efficientllm"


def leaf_types():
    """`{name: class}` of the leaves that registered forms make."""
    forms = [getattr(form, "func", form) for form in (lookup("quant", name) for name in names("quant"))]
    kinds = {
        form.leaf_type for form in forms if form.leaf_type is not None and dataclasses.is_dataclass(form.leaf_type)
    }
    return {kind.__name__: kind for kind in kinds}


class OwnQuantizedFolder:
    """The leaves of such a folder, by path. Raises UserError naming what `quantization_config` or the files lack."""

    def __init__(self, path, said):
        self.where, self._files, self._said = path, SafetensorsFolder(path), said.get("leaves")
        self._kinds = leaf_types()
        kinds = self._said.values() if isinstance(self._said, dict) else [None]
        for each in kinds:
            if not isinstance(each, dict) or str(each.get("leaf")) not in self._kinds:
                raise UserError(
                    f"{path / 'config.json'}: quantization_config.leaves holds {shown(each)}, no leaf of ours"
                )
        self.shapes = {name: shape for name, shape in self._files.shapes.items() if name.rpartition(".")[0] == ""}
        self.shapes |= {path: self.leaf(path).shape for path in self._said}

    def dtype(self, name):
        """float32 for what is rounded."""
        return np.dtype(np.float32) if name in self._said else self._files.dtype(name)

    def leaf(self, path):
        """The leaf at a path, in numpy; an array where nothing is rounded."""
        if path not in self._said:
            return self._files.read(path)
        said = dict(self._said[path])
        kind = self._kinds[said.pop("leaf")]
        held = {name.rpartition(".")[2] for name in self._files.shapes if name.rpartition(".")[0] == path}
        try:
            leaf = kind(**said, **{name: self._files.read(f"{path}.{name}") for name in held})
            leaf.check()
        except (TypeError, UserError) as error:
            raise UserError(f"{self.where}: {path!r} is no {kind.__name__}: {error}") from None
        return leaf

    def finite_leaf(self, path):
        """The leaf at a path, whose scales have been read. Raises UserError where one is not finite."""
        leaf = self.leaf(path)
        if path in self._said:
            try:
                consistency.check_finite(leaf)
            except UserError as error:
                raise UserError(f"{self.where}: {path!r}: {error}") from None
        return leaf

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def read(self, path):
        """The array that a path stands for, float32 where it is rounded."""
        leaf = self.finite_leaf(path)
        return np.asarray(leaf.dense()) if path in self._said else leaf

    def bind(self, lm):
        """`bind` below, of these files."""
        leaves = bind_parameters(self, lm)
        for name in self._files.shapes:
            if (of := name.rpartition(".")[0]) and of not in self._said:
                raise UserError(f"{self.where}: {name!r} is of {of!r}, which is none of quantization_config.leaves")
        return leaves


def bind_parameters(tensors, lm):
    """`{path: Leaf}` of all parameters of `lm`, read from `tensors` under our own paths. Raises UserError for one that
    is missing, of another shape, or of nothing in the model."""
    shapes = flax.traverse_util.flatten_dict(nn.unbox(models.abstract_params(lm)), sep="/")
    leaves = {path: Leaf(path, leaf.shape, _names(path, lm.num_groups)) for path, leaf in shapes.items()}
    wanted = {name: leaf.shape[name != leaf.path :] for leaf in leaves.values() for name in leaf.names}
    for name, shape in wanted.items():
        found = tensors.shapes.get(name)
        if found is None or tuple(found) != tuple(shape):
            shown = "missing" if found is None else f"of shape {list(found)}"
            raise UserError(f"{tensors.where}: {name!r} is {shown}, the config asks for {list(shape)}")
    if extra := sorted(tensors.shapes.keys() - wanted.keys()):
        raise UserError(f"{tensors.where}: {extra[0]!r} belongs to nothing in the model that the config describes")
    return leaves


def _names(path, groups):
    """The paths of layers apart that make one of layers that may be stacked."""
    rest = path.removeprefix("groups/")
    return [path] if rest == path else [f"group_{i}/{rest}" for i in range(groups)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What `binding.Leaf` is for the files of others."""

    path: str
    shape: tuple
    names: list

    def read(self, tensors, index, dtype):
        """The slice `index` of the parameter in `dtype`."""
        if self.names == [self.path]:
            return np.asarray(tensors.read(self.path)[index], dtype)
        chosen = self.names[index[0]]
        return np.stack([np.asarray(tensors.read(name)[index[1:]], dtype) for name in chosen])

    def stored(self, tensors):
        """The rounded leaf, or None where it is none, or one of stacked layers."""
        leaf = tensors.finite_leaf(self.path) if self.names == [self.path] else None
        return leaf if isinstance(leaf, Rows) else None
