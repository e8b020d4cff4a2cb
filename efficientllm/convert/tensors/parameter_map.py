"""Mapping between a model's parameters and the tensors of a checkpoint, and lazy reads of slices."""

import dataclasses
import itertools
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from efficientllm import model
from efficientllm.convert.tensors.layouts import LAYOUTS, Same, Sizes, transpose
from efficientllm.errors import UserError, did_you_mean

_BLOCK = re.compile(r"(?:groups(?:_\d+)?|group_(\d+))/block_(\d+)/(.*)")

TOWER = "vision/"  # the path of a vision-language model's tower, before its own parameters' paths


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter and the checkpoint tensors that hold it.

    Args:
      path: of the parameter, joined by slashes.
      shape: of the parameter.
      template: tensor names, with `{layer}` and `{expert}` where the parameter is stacked over them.
      layout: of the tensors (`layouts`).
      loops: the stacked leading axes: `(("layer", (0, 1, ...)), ("expert", (0, 1, ...)))`, one of them, or ().
      part: the parameter's index among those that share a tensor; `shapes` has the shapes of all of them.
      copies: further tensors that hold the same values, one for each layer but the first.
    """

    path: str
    shape: tuple[int, ...]
    template: str
    layout: Same
    loops: tuple[tuple[str, tuple[int, ...]], ...]
    part: int
    shapes: tuple[tuple[int, ...], ...]
    sizes: Sizes
    copies: tuple[str, ...] = ()

    def tensors(self, index: tuple[slice, ...] | None = None) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields `(position in the slice, tensor name)` for a slice of the parameter."""
        index = index or (slice(None),) * len(self.loops)
        chosen = [values[where] for (_, values), where in zip(self.loops, index, strict=True)]
        names = [name for name, _ in self.loops]
        for position in itertools.product(*(range(len(values)) for values in chosen)):
            at = {name: values[i] for name, values, i in zip(names, chosen, position, strict=True)}
            yield position, self.template.format(**at)

    def names(self) -> list[str]:
        """The names of all tensors that hold the parameter."""
        return [*(name for _, name in self.tensors()), *self.copies]

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """Shape of the tensors in the file."""
        return self.layout.shape(self.shapes, self.sizes)

    def read(self, tensors: typing.Any, index: tuple[slice, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """Reads the slice `index` of the parameter in `dtype`, as numpy; opens only the tensors that it needs."""
        index = tuple(slice(*where.indices(size)) for where, size in zip(index, self.shape, strict=True))
        depth = len(self.loops)
        out = np.empty([len(range(where.start, where.stop)) for where in index], dtype)
        for position, name in self.tensors(index[:depth]):
            whole = self.layout.take(tensors.read(name), self.part, self.shapes, self.sizes)
            out[position] = whole[index[depth:]]
        return out

    def stored(self, tensors: typing.Any) -> typing.Any:
        """The quantized leaf in the files, in numpy; None if a tensor is not quantized or layers are stacked."""
        if any(name == "layer" for name, _ in self.loops):
            return None
        leaves = [tensors.stored(name) for _, name in self.tensors()]
        if any(leaf is None for leaf in leaves):
            return None
        if self.path == "embedding":
            return leaves[0].T

        def rows(array):
            return transpose(self.layout.take(array, self.part, self.shapes, self.sizes))

        rows_of_leaves = [jax.tree.map(rows, leaf) for leaf in leaves]
        return jax.tree.map(lambda *arrays: np.stack(arrays) if self.loops else arrays[0], *rows_of_leaves)


class DiskTensor(typing.NamedTuple):
    """A tensor of a checkpoint; `parts` are `(parameter path, shape, position in its stacked axes)`, in order."""

    parts: list[typing.Any]
    layout: Same
    sizes: Sizes

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Joins arrays of the parts into the tensor."""
        return self.layout.join(arrays, self.sizes)

    def take(self, tensor: np.ndarray, part: int) -> np.ndarray:
        """Takes part number `part` of the tensor."""
        return self.layout.take(tensor, part, [shape for _, shape, _ in self.parts], self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.layout.shape([shape for _, shape, _ in self.parts], self.sizes)


def disk_tensors(leaves: dict[str, Leaf]) -> dict[str, DiskTensor]:
    """`{tensor name: DiskTensor}` of the leaves of `bind_parameters`."""
    tensors: dict[str, DiskTensor] = {}
    for leaf in leaves.values():
        for position, name in (*leaf.tensors(), *(((), name) for name in leaf.copies)):
            tensor = tensors.setdefault(name, DiskTensor([None] * len(leaf.shapes), leaf.layout, leaf.sizes))
            tensor.parts[leaf.part] = (leaf.path, leaf.shapes[leaf.part], position)
    return tensors


def bind_parameters(lm: model.Backbone, table: dict[str, tuple]) -> dict[str, Leaf]:
    """Maps every parameter of `lm` to its tensors, `{path: Leaf}`. Raises UserError for one that is not in `table`."""
    shapes = {
        "/".join(path): leaf.shape
        for path, leaf in flax.traverse_util.flatten_dict(nn.unbox(model.abstract_params(lm))).items()
    }
    entries = _by_parameter(table)
    leaves = {}
    for path, shape in shapes.items():
        prefix, inside, loops, layers = _place(path, lm, entries)
        if inside not in entries:
            raise UserError(f"parameter {path}: this family of checkpoints has no tensor for it")
        disk, parameters, layout = entries[inside]
        if "{expert}" in disk:
            loops = (*loops, ("expert", tuple(range(shape[len(loops)]))))
        is_stacked = any(name == "layer" for name, _ in loops) or "{layer}" not in disk
        template, *copies = [disk] if is_stacked else [disk.replace("{layer}", str(i)) for i in layers]
        stem = TOWER if path.startswith(TOWER) else ""
        siblings = tuple(shapes[prefix + parameter.removeprefix(stem)][len(loops) :] for parameter in parameters)
        index = parameters.index(inside)
        sizes = _sizes(lm, path)
        leaves[path] = Leaf(path, shape, template, LAYOUTS[layout], loops, index, siblings, sizes, tuple(copies))
    return leaves


def check_tensors(
    leaves: dict[str, Leaf],
    shapes: dict[str, tuple[int, ...]],
    ignored: Sequence[str],
    where: str | os.PathLike[str],
    harmless: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raises UserError naming the first tensor that is missing, has a wrong shape, or is unknown.

    Args:
      shapes: `{name: shape}` of the file.
      ignored: regular expressions of tensors that the model does not need.
      harmless: whether an unknown tensor changes nothing.
    """
    wanted = {name: leaf.disk_shape for leaf in leaves.values() for name in leaf.names()}
    for name, shape in wanted.items():
        if name not in shapes:
            raise UserError(f"{where}: tensor {name!r} of shape {list(shape)} is missing{did_you_mean(name, shapes)}")
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {list(shapes[name])}, the config asks for {list(shape)}"
            )
    for name in shapes:
        if name not in wanted and not any(re.search(pattern, name) for pattern in ignored) and not harmless(name):
            raise UserError(f"{where}: tensor {name!r} belongs to nothing in the model that the config describes")


def check_copies(leaves: dict[str, Leaf], tensors: typing.Any) -> None:
    """Raises UserError naming a copy of a parameter that differs from its first tensor."""
    for leaf in leaves.values():
        for name in leaf.copies:
            if not np.array_equal(tensors.read(name), tensors.read(leaf.template)):
                raise UserError(
                    f"{tensors.where}: tensor {name!r} is not {leaf.template!r}: the model has one for all layers"
                )


def _by_parameter(table):
    """`{path: (tensor name, all parameters in that tensor, layout)}`."""
    return {path: (disk, parameters, layout) for disk, (parameters, layout) in table.items() for path in parameters}


class _Place(typing.NamedTuple):
    """Where a parameter is: the path before `inside`, its stacked axes, and the layers of the file that hold it."""

    prefix: str
    inside: str
    loops: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[int, ...]


def _place(path, lm, entries):
    """The `_Place` of a parameter. Names of a table for a tower begin with TOWER, within its blocks too."""
    if path.startswith(TOWER):
        of_tower = {name.removeprefix(TOWER): entry for name, entry in entries.items() if name.startswith(TOWER)}
        place = _place(path.removeprefix(TOWER), lm.vision, of_tower)
        return place._replace(prefix=TOWER + place.prefix, inside=TOWER + place.inside)
    match = _BLOCK.fullmatch(path)
    if match is None:
        return _Place("", path, (), tuple(range(sum(map(len, lm.stacks.layer_numbers)))))
    group, block, inside = match.groups()
    layers = tuple(lm.stacks.layer_numbers[int(block)])
    if (in_group := f"block_{block}/{inside}") in entries:  # a layer of the file is a group of blocks
        inside, layers = in_group, tuple(range(len(layers)))
    prefix = path[: len(path) - len(inside)]
    if group is None:
        return _Place(prefix, inside, (("layer", layers),), layers)
    _, (number,) = lm.stacks.stacked_path(path)
    return _Place(prefix, inside, (), layers[number : number + 1])


def _sizes(lm, path):
    if path.startswith(TOWER):
        return dataclasses.replace(_sizes(lm.vision, path.removeprefix(TOWER)), frames=lm.vision.frames)
    match = _BLOCK.fullmatch(path)
    if match is None:
        return Sizes(patch=lm.patch_side(), dim=lm.dim)
    mixer, *_ = model.parts(lm)[int(match[2])].mixers
    return Sizes(*mixer.head_counts(), dim=lm.dim)
