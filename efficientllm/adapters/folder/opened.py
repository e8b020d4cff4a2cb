"""A folder of peft's, opened: its config and headers are read, its tensors one at a time. And its adapters as ours."""

import math
import pathlib
import typing

import flax.traverse_util
import jax
import numpy as np

from efficientllm.adapters.base import KERNEL
from efficientllm.adapters.dora import DoRA
from efficientllm.adapters.folder import limits
from efficientllm.adapters.folder.config import read_config
from efficientllm.adapters.lora import LoRA
from efficientllm.convert import binding, mapped
from efficientllm.convert.safetensors_file import read_header
from efficientllm.errors import UserError, did_you_mean

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WEIGHT = ".weight"
# What peft calls each of our arrays; A and B lie as [out, in].
NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


class Factors(typing.NamedTuple):
    """A module's adapter as peft holds it: `a` `[R, in]`, `b` `[out, R]`, `m` `[out]` of DoRA or None."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray
    scale: float


class Adapter:
    """A folder of peft's around the tensors `{name on disk: binding.OnDisk}` of a model.

    Raises UserError for a config that we do not compute, and naming the tensor that is missing, belongs to nothing, or
    has another shape.
    """

    def __init__(self, folder, tensors):
        self.config = read_config(folder)
        self.file = pathlib.Path(folder) / TENSORS
        if not self.file.is_file():
            pickled = self.file.with_suffix(".bin").is_file()
            why = "adapter_model.bin is a pickle, which is never loaded" if pickled else "no folder of an adapter"
            raise UserError(f"{self.file} is missing: {why}")
        self._entries = read_header(self.file)
        self._parts = [part for part in NAMES if part != "m" or self.config.name == "dora"]
        self.modules = set()
        for name in sorted(self._entries):
            self._require_known(name, tensors)
        for module in sorted(self.modules):
            self._check(module, tensors[module + WEIGHT].shape)

    def _require_known(self, name, tensors):
        module, _, _ = name.removeprefix(PREFIX).rpartition(".lora_")
        if module + WEIGHT not in tensors or name not in self._names(module).values():
            raise UserError(
                f"{self.file}: tensor {name!r} belongs to nothing in the model: an adapter of another model"
            )
        self.modules.add(module)

    def _names(self, module):
        return {part: f"{PREFIX}{module}.{NAMES[part]}" for part in self._parts}

    def _check(self, module, shape):
        rank = self.config.rank_of(module)
        wanted = {"a": (rank, shape[1]), "b": (shape[0], rank), "m": (shape[0],)}
        for part, name in self._names(module).items():
            if name not in self._entries:
                raise UserError(f"{self.file}: tensor {name!r} is missing{did_you_mean(name, self._entries)}")
            if (found := self._entries[name][1]) != wanted[part]:
                raise UserError(
                    f"{self.file}: tensor {name!r} has shape {list(found)}, the model asks for {list(wanted[part])}: "
                    "an adapter of another model or rank"
                )

    def factors(self, module):
        """The module's adapter, float32."""
        found = {}
        for part, name in self._names(module).items():
            dtype, shape, offset = self._entries[name]
            found[part] = np.asarray(mapped.array(self.file, offset, dtype, shape), np.float32)
            if not np.isfinite(found[part]).all():
                raise UserError(f"{self.file}: tensor {name!r} holds NaN or infinity")
        return Factors(found["a"], found["b"], found.get("m"), self.config.scale_of(module))

    def base(self, module, weight):
        """What is frozen of a tensor `[out, in]`, float32: PiSSA's is what its first singular values leave."""
        if self.config.name != "pissa":
            return weight
        rank = self.config.rank_of(module)
        if rank > min(weight.shape):
            raise UserError(f"{self.file}: pissa of rank {rank} around {module} of {list(weight.shape)}: too large")
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        return weight - (u[:, :rank] * s[:rank]) @ vt[:rank]


def around(source, lm, params, folder):
    """`params` of `lm`, those of a checkpoint, with the adapters of a folder of peft's around their kernels.

    A layer that the folder does not adapt, of a stack that it does, gets an adapter that changes nothing.
    """
    leaves = binding.bind(lm, limits.table_of(source))
    tensors = {
        name: tensor
        for name, tensor in binding.on_disk(leaves).items()
        if all(KERNEL.search(path) for path, _, _ in tensor.parts)
    }
    adapter, flat = Adapter(folder, tensors), flax.traverse_util.flatten_dict(params, sep="/")

    def whole(name):
        parts = [np.asarray(flat[path][position], np.float32) for path, _, position in tensors[name].parts]
        return tensors[name].join(parts)

    adapted = {path for module in adapter.modules for path, _, _ in tensors[module + WEIGHT].parts}
    new = {path: _leaf(adapter, leaves[path], flat[path], whole) for path in adapted}
    return flax.traverse_util.unflatten_dict(flat | new, sep="/")


def _leaf(adapter, leaf, kernel, whole):
    """The adapter of one of our kernels, of all layers that it stacks; `whole(name)` is a tensor as it is on disk."""
    take = lambda tensor: leaf.layout.take(tensor, leaf.part, leaf.shapes, leaf.heads)  # noqa: E731
    modules = {name: name.removesuffix(WEIGHT) for _, name in leaf.tensors()}
    found = {name: adapter.factors(module) for name, module in modules.items() if module in adapter.modules}
    rank, scale = _common(adapter, found)
    base = np.array(kernel, np.float32)
    *stack, width_in, width_out = base.shape
    a, b = np.zeros((*stack, width_in, rank), np.float32), np.zeros((*stack, rank, width_out), np.float32)
    m = np.linalg.norm(base, axis=-2)
    for position, name in leaf.tensors():
        if name not in found:
            continue
        a[position], b[position] = found[name].a.T, take(found[name].b)
        if adapter.config.name == "pissa":
            base[position] = take(adapter.base(modules[name], whole(name)))
        if found[name].m is not None:
            m[position] = take(found[name].m)
    base = kernel if adapter.config.name != "pissa" else jax.numpy.asarray(base)
    a, b, m = map(jax.numpy.asarray, (a, b, m))
    held = {"scale": scale, "dropout": adapter.config.dropout}
    return DoRA(base, a, b, m, **held) if adapter.config.name == "dora" else LoRA(base, a, b, **held)


def _common(adapter, found):
    """The rank and scale of all adapters of a stack. Raises UserError where they differ."""
    kinds = {name: (factors.a.shape[0], factors.scale) for name, factors in found.items()}
    (first, kind), *rest = kinds.items()
    for name, other in rest:
        if other[0] != kind[0] or not math.isclose(other[1], kind[1]):
            raise UserError(
                f"{adapter.file}: {first} and {name} have ranks and scales {kind} and {other}: kernels of stacked "
                "layers share theirs; merge the adapter into the checkpoint instead"
            )
    return kind
