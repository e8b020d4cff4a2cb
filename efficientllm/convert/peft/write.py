"""Writes tuned adapters as a folder that PEFT loads.

A tensor of transformers that holds several of our kernels has one PEFT adapter, of the sum of their ranks: A is
`[a_1; a_2; ...]`, B is block-diagonal, with b_i in the rows of kernel i; a kernel without an adapter has no block. This
is exact for every method that adds `scale A B`, and for DoRA, whose norms are per output. rank_pattern and
alpha_pattern hold the rank and alpha of such a tensor.
"""

from __future__ import annotations

import collections
import json
import pathlib
import typing

import flax.traverse_util
import numpy as np

from efficientllm.convert.peft import full_delta, lora_file, unsupported
from efficientllm.convert.peft.adapter_config import CONFIG, scale_divisor
from efficientllm.convert.peft.read import NAMES, PREFIX, TENSORS, WEIGHT
from efficientllm.convert.tensors import parameter_map
from efficientllm.convert.tensors.vision_names import renamed
from efficientllm.model import Backbone
from efficientllm.registry import build, parse_spec
from efficientllm.runtime import distributed
from efficientllm.runtime.atomic_write import replacing, write_atomically
from efficientllm.typing import Params, PathLike

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source


class _TunedRun(typing.NamedTuple):
    """A run's adapter leaves and the checkpoint around which they were tuned.

    `has_magnitudes`: its adapters are DoRA's. `splits_start`: the method changes the kernel at its start (PiSSA), but
    is written as one that does not.
    """

    leaves: dict[str, typing.Any]
    bound: dict[str, typing.Any]
    source: Source
    has_magnitudes: bool
    splits_start: bool


def write(lm: Backbone, spec: str, params: Params, folder: PathLike, source: Source) -> None:
    """Writes the adapters among `params` to `folder` atomically. Collective: the main process writes.

    LoRA and its kin around a diffusion model are written in the file format of diffusers too (`lora_file`). `spec` is
    `config.adapter`, `source` the checkpoint around which they were tuned. Raises UserError for an adapter that PEFT
    cannot load.
    """
    (name, _), method = parse_spec(spec), build("adapter", spec)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    leaves = {path: leaf for path, leaf in flat.items() if isinstance(leaf, method.leaf_type)}
    bound = parameter_map.bind_parameters(lm, unsupported.table_of(source))
    family = unsupported.family_of(source)
    renames = family.modules if family else ()
    modules = {
        renamed(tensor_name, renames).removesuffix(WEIGHT): tensor
        for tensor_name, tensor in parameter_map.disk_tensors(bound).items()
        if any(path in leaves for path, _, _ in tensor.parts)
    }
    written = unsupported.written_method(method, modules)
    unsupported.check_supported(name, written, modules, source.config.get("model_type"))
    if written.peft.kind != "LORA":
        if form := full_delta.peft_form(written, leaves, modules):
            tensors, config = form
            _save(pathlib.Path(folder), tensors, _common(written.peft.kind, modules, source) | config)
        return
    tuned = _Tuned(method, leaves, modules, source, lm)
    tensors, config = _lora_form(tuned, written)
    in_diffusers = None
    if lm.reads == "images":  # whose loader would split the kernel again for PiSSA
        plain = written.peft.fallback if written.splits_kernel else ""
        in_diffusers = _lora_form(tuned, build("adapter", plain)) if plain else (tensors, config)
    if distributed.is_main():
        _save(pathlib.Path(folder), {f"{PREFIX}{name}": array for name, array in tensors.items()}, config)
        if in_diffusers is not None:
            lora_file.write(pathlib.Path(folder), *in_diffusers)


class _Tuned(typing.NamedTuple):
    """What `write` is given: the method, its leaves by path, the modules around which they are, their checkpoint."""

    method: typing.Any
    leaves: dict[str, typing.Any]
    modules: dict[str, typing.Any]
    source: Source
    lm: Backbone


def _lora_form(tuned, written):
    """`({module.tensor: array}, adapter_config)` of LoRA and its kin, written as the method `written`.

    Collective: every process calls it; both are empty on all but the main one.
    """
    method, source = tuned.method, tuned.source
    splits_start = method.splits_kernel and not written.splits_kernel
    leaves = {path: _on_host(leaf, method.learnt, splits_start) for path, leaf in tuned.leaves.items()}
    if not distributed.is_main():
        return {}, {}
    run = _TunedRun(leaves, source.bind(tuned.lm), source, "m" in method.learnt, splits_start)
    arrays = {module: _module(tensor, run) for module, tensor in tuned.modules.items()}
    tensors = {
        f"{module}.{NAMES[factor]}": value for module, factors in arrays.items() for factor, value in factors.items()
    }
    return tensors, _config(written, next(iter(leaves.values())), arrays, source)


def _on_host(leaf, learnt, with_base):
    """Gathers the `learnt` factors of a leaf, and with `with_base` its frozen kernel, to every host."""
    whole = {name: distributed.to_host(getattr(leaf, name)) for name in learnt}
    return leaf.replace(base=distributed.to_host(leaf.base) if with_base else None, **whole)


def _module(tensor, run):
    """`{a, b, m}` of one PEFT adapter."""
    pairs = [_part(path, position, run) for path, _, position in tensor.parts]
    ranks = [0 if pair is None else pair[0].shape[1] for pair in pairs]
    a = np.concatenate([pair[0].T for pair in pairs if pair is not None])
    blocks = []
    for i, (pair, (_, (_, width_out), _)) in enumerate(zip(pairs, tensor.parts, strict=True)):
        block = np.zeros((sum(ranks), width_out), np.float32)
        if pair is not None:
            block[sum(ranks[:i]) : sum(ranks[: i + 1])] = pair[1]
        blocks.append(block)
    arrays = {"a": a, "b": tensor.join(blocks)}
    if run.has_magnitudes:
        arrays["m"] = tensor.join([_magnitude(path, position, run) for path, _, position in tensor.parts])
    return {key: np.ascontiguousarray(value) for key, value in arrays.items()}


def _part(path, position, run):
    """`(a [in, R], b [R, out])` of one kernel, or None; with `splits_start`, of the change since step 0."""
    if path not in run.leaves:
        return None
    leaf = run.leaves[path]
    a, b = (np.asarray(value[position], np.float32) for value in (leaf.a, leaf.b))
    if not run.splits_start:
        return a, b
    before = _kernel(path, position, run) - np.asarray(leaf.base[position], np.float32)
    u, s, vt = np.linalg.svd(before, full_matrices=False)
    rank = a.shape[1]
    initial_a = u[:, :rank] * (s[:rank] / leaf.scale)
    return np.concatenate([a, initial_a], 1), np.concatenate([b, -vt[:rank]])


def _magnitude(path, position, run):
    """DoRA's magnitudes of a kernel; without an adapter, its column norms."""
    if path in run.leaves:
        return np.asarray(run.leaves[path].m[position], np.float32)
    return np.linalg.norm(_kernel(path, position, run), axis=0)


def _kernel(path, position, run):
    leaf = run.bound[path]
    index = [slice(i, i + 1) for i in position] + [slice(None)] * 2
    return leaf.read(run.source.tensors, tuple(index), np.float32)[(0,) * len(position)]


def _config(method, leaf, arrays, source):
    ranks = {module: factors["a"].shape[0] for module, factors in arrays.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]

    def alpha(rank):
        return round(leaf.scale * scale_divisor(method.peft.options, rank), 9)

    other_ranks = {module: module_rank for module, module_rank in ranks.items() if module_rank != rank}
    return _common("LORA", ranks, source) | {
        "r": rank,
        "lora_alpha": alpha(rank),
        "rank_pattern": other_ranks,
        "alpha_pattern": {module: alpha(module_rank) for module, module_rank in other_ranks.items()},
        "lora_dropout": 0.0 if unsupported.has_experts(arrays) else leaf.dropout,
        **{"use_rslora": False, "use_dora": False, "init_lora_weights": True} | method.peft.options,
        "bias": "none",
    }


def _common(kind, modules, source):
    """The keys that every adapter_config.json has."""
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM" if "model_type" in source.config else None,
        "base_model_name_or_path": source.name or str(source.path),
        "target_modules": sorted(modules),
        "inference_mode": True,
    }


def _save(folder, tensors, config):
    """Writes an adapter's two files, each atomically."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TENSORS) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
    write_atomically(folder / CONFIG, json.dumps(config, indent=2))
