"""A folder of peft's, opened: its config and headers are read, its tensors one at a time. And its adapters as ours."""

import math
import pathlib
import typing

import flax.traverse_util
import jax
import numpy as np

from efficientllm.adapters.base import KERNEL
from efficientllm.convert.files import memory_map
from efficientllm.convert.files.safetensors_file import read_header
from efficientllm.convert.peft import adapter_kinds as kinds
from efficientllm.convert.peft import unsupported
from efficientllm.convert.peft.adapter_config import read_config
from efficientllm.convert.tensors import parameter_map
from efficientllm.errors import UserError, did_you_mean

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WEIGHT = ".weight"
HEADS = ("lm_head.weight", "embed_out.weight")
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
        self.method = self.config.method_of()
        self._tables = {name for name, tensor in tensors.items() if _is_table(tensor)}
        self._held, self.saved = {}, {}
        for name in sorted(self._entries):
            self._place(name, tensors)
        self.modules = set(self._held)
        for module in sorted(self.modules):
            self._check(module, self.shape(module + WEIGHT, tensors))

    def _place(self, name, tensors):
        """Finds the module that a tensor is of, or the tensor of the model in whose place it is saved."""
        inner = name.removeprefix(PREFIX)
        part = next((part for part in kinds.PARTS[self.config.kind] if inner.endswith(f".{part}")), None)
        whole = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if part and _adaptable(tensors.get((module := inner.removesuffix(f".{part}")) + WEIGHT)):
            self._held.setdefault(module, {})[part] = name
        elif part is None and (whole in tensors or whole in HEADS):
            self.saved[whole] = name
        elif part and f"{inner.removesuffix(f'.{part}')}{WEIGHT}" in HEADS:
            raise UserError(f"{self.file}: tensor {name!r} adapts the head, which is tied to the embedding here")
        else:
            raise UserError(
                f"{self.file}: tensor {name!r} belongs to nothing in the model: an adapter of another model"
            )

    def shape(self, name, tensors):
        """The shape of the model's tensor under a name: that of the one saved in its place, if any."""
        return self._entries[self.saved[name]][1] if name in self.saved else tensors[name].shape

    def whole(self, name):
        """The tensor that is saved in the place of the model's, float32."""
        return self._array(self.saved[name])

    def _array(self, name):
        dtype, shape, offset = self._entries[name]
        found = np.asarray(memory_map.map_array(self.file, offset, dtype, shape), np.float32)
        if not np.isfinite(found).all():
            raise UserError(f"{self.file}: tensor {name!r} holds NaN or infinity")
        return found

    def _names(self, module):
        if module + WEIGHT in self._tables:
            return {"a": f"{PREFIX}{module}.lora_embedding_B", "b": f"{PREFIX}{module}.lora_embedding_A"}
        return {part: f"{PREFIX}{module}.{NAMES[part]}" for part in self.method.learnt}

    def _check(self, module, shape):
        if self.config.kind != "LORA":
            return  # its parts are looked at together
        rank = self.config.rank_of(module)
        wanted = {"a": (rank, shape[1]), "b": (shape[0], rank), "m": (shape[0],)}
        if module + WEIGHT in self._tables:
            wanted = {"a": (shape[1], rank), "b": (rank, shape[0])}
        if extra := set(self._held[module].values()) - set(self._names(module).values()):
            raise UserError(f"{self.file}: tensor {min(extra)!r} is none of a {self.config.name} around {module}")
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
        found = {part: self._array(name) for part, name in self._names(module).items()}
        if module + WEIGHT in self._tables:
            found = {"a": found["a"].T, "b": found["b"].T}
        return Factors(found["a"], found["b"], found.get("m"), self.config.scale_of(module))

    def changed(self, module, weight):
        """The weight `[out, in]` with a LoHa, LoKr or GLoRA of the module, float32."""
        parts = {part: self._array(name) for part, name in self._held[module].items()}
        try:
            return kinds.change(self.config.kind, weight, parts, self.config.scale_of(module))
        except ValueError as error:
            raise UserError(f"{self.file}: {module}: {error}") from None

    def base(self, module, weight):
        """The frozen part of a tensor `[out, in]`, float32."""
        rank, name = self.config.rank_of(module), self.config.name
        if self.method.splits_kernel and rank > min(weight.shape):
            raise UserError(f"{self.file}: {name} of rank {rank} around {module} of {list(weight.shape)}: too large")
        return self.config.method_of(module).frozen(weight)


def _is_table(tensor):
    return [path for path, _, _ in tensor.parts] == ["embedding"]


def _adaptable(tensor):
    return tensor is not None and (_is_table(tensor) or all(path.endswith("kernel") for path, _, _ in tensor.parts))


def around(source, lm, params, folder):
    """`params` of `lm`, those of a checkpoint, with the adapters of a folder of peft's around their kernels.

    A layer that the folder does not adapt, of a stack that it does, gets an adapter that changes nothing.
    """
    leaves = parameter_map.bind_parameters(lm, unsupported.table_of(source))
    tensors = {
        name: tensor
        for name, tensor in parameter_map.disk_tensors(leaves).items()
        if all(KERNEL.search(path) for path, _, _ in tensor.parts)
    }
    adapter = Adapter(folder, tensors)
    if adapter.config.kind != "LORA" or adapter.saved:
        raise UserError(f"{adapter.file}: {adapter.config.name} is merged into the model, not put around its kernels")
    flat = flax.traverse_util.flatten_dict(params, sep="/")

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
        if adapter.method.splits_kernel:
            base[position] = take(adapter.base(modules[name], whole(name)))
        if found[name].m is not None:
            m[position] = take(found[name].m)
    arrays = {name: jax.numpy.asarray(array) for name, array in zip("abm", (a, b, m), strict=True)}
    return adapter.method.leaf_type(
        jax.numpy.asarray(base) if adapter.method.splits_kernel else kernel,
        **{name: arrays[name] for name in adapter.method.learnt},
        scale=scale,
        dropout=adapter.config.dropout,
    )


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
