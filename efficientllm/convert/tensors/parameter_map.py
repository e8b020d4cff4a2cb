"""A model's parameters bound to the tensors of a file: which tensors make a leaf, in what layout, slice by slice."""

import dataclasses
import itertools
import re
import typing

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from efficientllm import model
from efficientllm.convert.tensors.layouts import LAYOUTS, Heads, flipped
from efficientllm.errors import UserError, did_you_mean

_BLOCK = re.compile(r"(groups|group_(\d+))/block_(\d+)/(.*)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our parameters as it stands on disk.

    Args:
      path: ours, joined by slashes.
      shape: ours.
      template: names of the tensors, with `{layer}` and `{expert}` where ours is stacked over them.
      loops: what each leading axis of ours runs over: `(("layer", (0, 1, ...)), ("expert", (0, 1, ...)))`, or less.
      part: which part of those tensors it is; `shapes` are those of all parts.
    """

    path: str
    shape: tuple
    template: str
    layout: object
    loops: tuple
    part: int
    shapes: tuple
    heads: Heads

    def tensors(self, index=None):
        """Yields `(position in what is read, name)` of the tensors under a slice of ours."""
        index = index or (slice(None),) * len(self.loops)
        chosen = [values[where] for (_, values), where in zip(self.loops, index, strict=True)]
        names = [name for name, _ in self.loops]
        for position in itertools.product(*(range(len(values)) for values in chosen)):
            at = {name: values[i] for name, values, i in zip(names, chosen, position, strict=True)}
            yield position, self.template.format(**at)

    @property
    def disk_shape(self):
        return self.layout.shape(self.shapes, self.heads)

    def read(self, tensors, index, dtype):
        """The slice `index` of ours in `dtype`, a numpy array; only the tensors under it are touched."""
        index = tuple(slice(*where.indices(size)) for where, size in zip(index, self.shape, strict=True))
        depth = len(self.loops)
        out = np.empty([len(range(where.start, where.stop)) for where in index], dtype)
        for position, name in self.tensors(index[:depth]):
            whole = self.layout.take(tensors.read(name), self.part, self.shapes, self.heads)
            out[position] = whole[index[depth:]]
        return out

    def stored(self, tensors):
        """The leaf that the files hold rounded, in numpy; None where one is not, or layers are stacked."""
        if any(name == "layer" for name, _ in self.loops):
            return None
        found = [tensors.stored(name) for _, name in self.tensors()]
        if any(each is None for each in found):
            return None
        if self.path == "embedding":
            return found[0].T
        rows = lambda array: flipped(self.layout.take(array, self.part, self.shapes, self.heads))  # noqa: E731
        parts = [jax.tree.map(rows, each) for each in found]
        return jax.tree.map(lambda *arrays: np.stack(arrays) if self.loops else arrays[0], *parts)


class OnDisk(typing.NamedTuple):
    """A tensor of a file: `parts` are `(our path, its shape there, position in our leading axes)`, in their order."""

    parts: list
    layout: object
    heads: Heads

    def join(self, arrays):
        """The tensor that arrays of the parts make."""
        return self.layout.join(arrays, self.heads)

    def take(self, tensor, part):
        """Part number `part` of the tensor."""
        return self.layout.take(tensor, part, [shape for _, shape, _ in self.parts], self.heads)

    @property
    def shape(self):
        return self.layout.shape([shape for _, shape, _ in self.parts], self.heads)


def on_disk(leaves):
    """`{name of a tensor: OnDisk}` of what `bind` gives."""
    found = {}
    for leaf in leaves.values():
        for position, name in leaf.tensors():
            tensor = found.setdefault(name, OnDisk([None] * len(leaf.shapes), leaf.layout, leaf.heads))
            tensor.parts[leaf.part] = (leaf.path, leaf.shapes[leaf.part], position)
    return found


def bind(lm, table):
    """`{our path: Leaf}` for every parameter of `lm`. Raises UserError for one that the table does not know."""
    shapes = {
        "/".join(path): leaf.shape
        for path, leaf in flax.traverse_util.flatten_dict(nn.unbox(model.abstract_params(lm))).items()
    }
    entries = _by_parameter(table)
    leaves = {}
    for path, shape in shapes.items():
        prefix, inside, loops = _place(path, lm)
        if inside not in entries:
            raise UserError(f"parameter {path}: this family of checkpoints has no tensor for it")
        disk, parts, layout = entries[inside]
        if "{expert}" in disk:
            loops = (*loops, ("expert", tuple(range(shape[len(loops)]))))
        template = disk if any(name == "layer" for name, _ in loops) else _at_layer(disk, path, lm)
        siblings = tuple(shapes[f"{prefix}{part}"][len(loops) :] for part in parts)
        part = parts.index(inside)
        heads = _heads(lm, path)
        leaves[path] = Leaf(path, shape, template, LAYOUTS[layout], loops, part, siblings, heads)
    return leaves


def check(leaves, found, ignored, where, passed=lambda name: False):
    """Raises UserError naming the first tensor that is missing, has another shape, or belongs to nothing.

    Args:
      found: `{name: shape}` of the file.
      ignored: regular expressions of tensors that the model does not need.
      passed: whether a tensor of another name changes nothing.
    """
    wanted = {name: leaf.disk_shape for leaf in leaves.values() for _, name in leaf.tensors()}
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name!r} of shape {list(shape)} is missing{did_you_mean(name, found)}")
        if tuple(found[name]) != shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {list(found[name])}, the config asks for {list(shape)}"
            )
    for name in found:
        if name not in wanted and not any(re.search(pattern, name) for pattern in ignored) and not passed(name):
            raise UserError(f"{where}: tensor {name!r} belongs to nothing in the model that the config describes")


def _by_parameter(table):
    """`{our path: (name on disk, all parts of that tensor, layout)}`."""
    return {path: (disk, parts, layout) for disk, (parts, layout) in table.items() for path in parts}


def _place(path, lm):
    """`(prefix, path within the block or the model, leading loops)` of a parameter."""
    found = _BLOCK.fullmatch(path)
    if found is None:
        return "", path, ()
    stack, _, block, inside = found.groups()
    prefix = path[: len(path) - len(inside)]
    if stack != "groups":
        return prefix, inside, ()
    step = len(lm.blocks)
    return prefix, inside, (("layer", tuple(range(int(block), lm.num_groups * step, step))),)


def _at_layer(disk, path, lm):
    found = _BLOCK.fullmatch(path)
    if found is None:
        return disk
    layer = int(found[2]) * len(lm.blocks) + int(found[3])
    return disk.replace("{layer}", str(layer))


def _heads(lm, path):
    found = _BLOCK.fullmatch(path)
    if found is None:
        return Heads()
    mixer, _ = model.parts(lm)[int(found[3])]
    return Heads(*mixer.head_counts())
