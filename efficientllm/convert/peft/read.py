"""Reads PEFT adapter folders, one tensor at a time, and wraps kernels in their adapters."""

from __future__ import annotations

import math
import pathlib
import typing
from collections.abc import Mapping

import flax.traverse_util
import jax
import numpy as np

from efficientllm.adapters.base import KERNEL
from efficientllm.convert.files import memory_map
from efficientllm.convert.files.safetensors_file import read_header
from efficientllm.convert.peft import adapter_kinds as kinds
from efficientllm.convert.peft import lora_file, unsupported
from efficientllm.convert.peft.adapter_config import read_config
from efficientllm.convert.tensors import parameter_map
from efficientllm.convert.tensors.vision_names import renamed
from efficientllm.errors import UserError, did_you_mean
from efficientllm.model import Backbone
from efficientllm.typing import Params, PathLike

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WEIGHT, BIAS = ".weight", ".bias"
HEADS = ("lm_head.weight", "embed_out.weight")
# PEFT's names of our arrays; its A and B are [out, in].
NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


class Factors(typing.NamedTuple):
    """Low-rank factors of a module in PEFT's layout: `a` `[R, in]`, `b` `[out, R]`, DoRA's `m` `[out]` or None."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    scale: float


class Adapter:
    """An open PEFT folder, or one of diffusers, matched with the tensors `{name on disk: DiskTensor}` of a model.

    `family` says by which names transformers' modules of several generations go.

    Raises UserError for unsupported settings, and naming a tensor that is missing, matches no module, or has a wrong
    shape.
    """

    def __init__(self, folder: PathLike, tensors: Mapping[str, parameter_map.DiskTensor], family: typing.Any = None):
        self.config = read_config(folder)
        of_diffusers = lora_file.find(pathlib.Path(folder))
        self.file = of_diffusers or pathlib.Path(folder) / TENSORS
        self.prefix = PREFIX if of_diffusers is None else lora_file.prefix_of(of_diffusers)
        if not self.file.is_file():
            pickled = self.file.with_suffix(".bin").is_file()
            why = "adapter_model.bin is a pickle, which is never loaded" if pickled else "no folder of an adapter"
            raise UserError(f"{self.file} is missing: {why}")
        renames = family.renames if family else ()
        self._entries = {self._table_name(name, renames): entry for name, entry in read_header(self.file).items()}
        self._modules = family.modules if family else ()
        self.method = self.config.method_of()
        self._tables = {name for name, tensor in tensors.items() if _is_table(tensor)}
        self._biased = {name.removesuffix(BIAS) for name in tensors if name.endswith(BIAS)}
        self._tensor_names: dict[str, dict[str, str]] = {}
        self.saved: dict[str, str] = {}
        for name in sorted(self._entries):
            self._place(name, tensors)
        self.modules = set(self._tensor_names)
        for module in sorted(self.modules):
            self._check(module, self.shape(module + WEIGHT, tensors))

    def _table_name(self, name, renames):
        """The name of an adapter's tensor with its module as the table of the model's tensors has it."""
        has_prefix = name.startswith(self.prefix)
        return self.prefix * has_prefix + renamed(name.removeprefix(self.prefix), renames)

    def _listed(self, module):
        """The module as patterns of ranks name it: as transformers does, or as files of an older generation did."""
        name = renamed(module, self._modules)
        return module if self.config.has_pattern(module) and not self.config.has_pattern(name) else name

    def _place(self, name, tensors):
        """Matches a tensor with the module that it adapts, or with the tensor of the model that it replaces."""
        inner = name.removeprefix(self.prefix)
        suffix = next((suffix for suffix in kinds.PARTS[self.config.kind] if inner.endswith(f".{suffix}")), None)
        whole = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if suffix and _adaptable(tensors.get((module := inner.removesuffix(f".{suffix}")) + WEIGHT)):
            self._tensor_names.setdefault(module, {})[suffix] = name
        elif suffix is None and (whole in tensors or whole in HEADS):
            self.saved[whole] = name
        elif suffix and f"{inner.removesuffix(f'.{suffix}')}{WEIGHT}" in HEADS:
            raise UserError(f"{self.file}: tensor {name!r} adapts the head, which is tied to the embedding here")
        else:
            raise UserError(
                f"{self.file}: tensor {name!r} belongs to nothing in the model: an adapter of another model"
            )

    def shape(self, name: str, tensors: Mapping[str, parameter_map.DiskTensor]) -> tuple[int, ...]:
        """The shape of a tensor of the model; if the folder replaces it, that of the replacement."""
        return self._entries[self.saved[name]][1] if name in self.saved else tensors[name].shape

    def whole(self, name: str) -> np.ndarray:
        """Reads the tensor that replaces the model's, in float32."""
        return self._array(self.saved[name])

    def _array(self, name):
        dtype, shape, offset = self._entries[name]
        array = np.asarray(memory_map.map_array(self.file, offset, dtype, shape), np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{self.file}: tensor {name!r} holds NaN or infinity")
        return array

    def _names(self, module):
        if module + WEIGHT in self._tables:
            return {"a": f"{self.prefix}{module}.lora_embedding_B", "b": f"{self.prefix}{module}.lora_embedding_A"}
        return {factor: f"{self.prefix}{module}.{NAMES[factor]}" for factor in self.method.learnt}

    def _check(self, module, shape):
        if self.config.kind != "LORA":
            return  # add_adapter checks the shapes
        rank = self.config.rank_of(self._listed(module))
        expected = {"a": (rank, shape[1]), "b": (shape[0], rank), "m": (shape[0],)}
        if module + WEIGHT in self._tables:
            expected = {"a": (shape[1], rank), "b": (rank, shape[0])}
        if extra := set(self._tensor_names[module].values()) - set(self._names(module).values()):
            raise UserError(f"{self.file}: tensor {min(extra)!r} is not one of {self.config.name} of {module}")
        for factor, name in self._names(module).items():
            if name not in self._entries:
                raise UserError(f"{self.file}: tensor {name!r} is missing{did_you_mean(name, self._entries)}")
            if (stored_shape := self._entries[name][1]) != expected[factor]:
                raise UserError(
                    f"{self.file}: tensor {name!r} has shape {list(stored_shape)}, the model asks for "
                    f"{list(expected[factor])}: an adapter of another model or rank"
                )

    def factors(self, module: str) -> Factors:
        """Reads the low-rank factors of a module, in float32."""
        arrays = {factor: self._array(name) for factor, name in self._names(module).items()}
        if module + WEIGHT in self._tables:
            arrays = {"a": arrays["a"].T, "b": arrays["b"].T}
        return Factors(arrays["a"], arrays["b"], arrays.get("m"), self.config.scale_of(self._listed(module)))

    def changed(self, module: str, weight: np.ndarray) -> np.ndarray:
        """Merges the LoHa, LoKr or GLoRA of a module into its weight `[out, in]`, in float32."""
        arrays = self._parts(module)
        if module not in self._biased and kinds.changes_bias(arrays):
            raise UserError(f"{self.file}: {module}: its adapter changes a bias, and the model has none there")
        try:
            return kinds.add_adapter(self.config.kind, weight, arrays, self.config.scale_of(self._listed(module)))
        except ValueError as error:
            raise UserError(f"{self.file}: {module}: {error}") from None

    def changes_bias(self, name: str) -> bool:
        """Whether the adapter of a module may change the tensor `name`, its bias."""
        return self.config.kind == "GLORA" and name.endswith(BIAS) and name.removesuffix(BIAS) in self.modules

    def changed_bias(self, module: str, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Merges the GLoRA of a module into its bias `[out]`, in float32; `weight` is the module's without adapter."""
        try:
            return kinds.add_to_bias(bias, weight, self._parts(module))
        except ValueError as error:
            raise UserError(f"{self.file}: {module}: {error}") from None

    def _parts(self, module):
        return {suffix: self._array(name) for suffix, name in self._tensor_names[module].items()}

    def base(self, module: str, weight: np.ndarray) -> np.ndarray:
        """The frozen part of a tensor `[out, in]`, float32."""
        rank, name = self.config.rank_of(self._listed(module)), self.config.name
        if self.method.splits_kernel and rank > min(weight.shape):
            raise UserError(f"{self.file}: {name} of rank {rank} around {module} of {list(weight.shape)}: too large")
        return self.config.method_of(self._listed(module)).frozen(weight)


def _is_table(tensor):
    return [path for path, _, _ in tensor.parts] == ["embedding"]


def _adaptable(tensor):
    return tensor is not None and (_is_table(tensor) or all(path.endswith("kernel") for path, _, _ in tensor.parts))


def around(source: Source, lm: Backbone, params: Params, folder: PathLike) -> Params:
    """Wraps the kernels in `params`, a checkpoint's parameters of `lm`, in the adapters of a PEFT folder.

    In a stack of layers of which the folder adapts some, the others get adapters that change nothing.
    """
    leaves = parameter_map.bind_parameters(lm, unsupported.table_of(source))
    tensors = {
        name: tensor
        for name, tensor in parameter_map.disk_tensors(leaves).items()
        if all(KERNEL.search(path) for path, _, _ in tensor.parts)
    }
    adapter = Adapter(folder, tensors, unsupported.family_of(source))
    if adapter.config.kind != "LORA" or adapter.saved:
        raise UserError(
            f"{adapter.file}: {adapter.config.name} can only be merged into the model, not loaded as an adapter"
        )
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def whole(name):
        arrays = [np.asarray(flat[path][position], np.float32) for path, _, position in tensors[name].parts]
        return tensors[name].join(arrays)

    adapted = {path for module in adapter.modules for path, _, _ in tensors[module + WEIGHT].parts}
    new = {path: _leaf(adapter, leaves[path], flat[path], whole) for path in adapted}
    return flax.traverse_util.unflatten_dict(flat | new, sep="/")


def _leaf(adapter, leaf, kernel, whole):
    """The adapter leaf of one kernel, of all its stacked layers; `whole(name)` returns a tensor in its disk layout."""

    def take(tensor):
        return leaf.layout.take(tensor, leaf.part, leaf.shapes, leaf.sizes)

    modules = {name: name.removesuffix(WEIGHT) for _, name in leaf.tensors()}
    adapters = {name: adapter.factors(module) for name, module in modules.items() if module in adapter.modules}
    rank, scale = _common(adapter, adapters)
    base = np.array(kernel, np.float32)
    *stack, width_in, width_out = base.shape
    a, b = np.zeros((*stack, width_in, rank), np.float32), np.zeros((*stack, rank, width_out), np.float32)
    m = np.linalg.norm(base, axis=-2)
    for position, name in leaf.tensors():
        if name not in adapters:
            continue
        a[position], b[position] = adapters[name].a.T, take(adapters[name].b)
        if adapter.method.splits_kernel:
            base[position] = take(adapter.base(modules[name], whole(name)))
        if adapters[name].m is not None:
            m[position] = take(adapters[name].m)
    arrays = {name: jax.numpy.asarray(array) for name, array in zip("abm", (a, b, m), strict=True)}
    return adapter.method.leaf_type(
        jax.numpy.asarray(base) if adapter.method.splits_kernel else kernel,
        **{name: arrays[name] for name in adapter.method.learnt},
        scale=scale,
        dropout=adapter.config.dropout,
    )


def _common(adapter, adapters):
    """The rank and scale that a stack's adapters share. Raises UserError if they differ."""
    kinds = {name: (factors.a.shape[0], factors.scale) for name, factors in adapters.items()}
    (first, kind), *rest = kinds.items()
    for name, other in rest:
        if other[0] != kind[0] or not math.isclose(other[1], kind[1]):
            raise UserError(
                f"{adapter.file}: {first} and {name} have ranks and scales {kind} and {other}: kernels of stacked "
                "layers share theirs; merge the adapter into the checkpoint instead"
            )
    return kind
