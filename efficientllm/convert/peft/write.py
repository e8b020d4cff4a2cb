"""What was tuned as a folder that peft loads.

A tensor of transformers that holds several kernels of ours has one adapter there. Ours side by side are one of a larger
rank: A is `[a_1; a_2; ...]` and B, of as many blocks, holds b_i in the rows of kernel i and zeros elsewhere; a kernel
without an adapter has no block. Exact for every method whose change is `scale A B`, and for DoRA, whose norms are of
single outputs. The rank and alpha of such a tensor stand in rank_pattern and alpha_pattern.
"""

import collections
import json
import pathlib
import typing

import flax.traverse_util
import numpy as np

from efficientllm.convert.peft import full_delta, unsupported
from efficientllm.convert.peft.adapter_config import CONFIG, scale_divisor
from efficientllm.convert.peft.read import NAMES, PREFIX, TENSORS, WEIGHT
from efficientllm.convert.tensors import parameter_map
from efficientllm.registry import build, parse_spec
from efficientllm.runtime import distributed
from efficientllm.runtime.atomic_write import replacing, write_atomically


class _Held(typing.NamedTuple):
    """What `_module` needs to know of the run."""

    leaves: dict
    bound: dict
    source: object
    apart: bool


def write(lm, spec, params, folder, source):
    """Writes the adapters among `params` to `folder`, whole or not at all; the first process does, all take part.

    `spec` is `config.adapter`, `source` the checkpoint around which they were tuned. Raises UserError for one that peft
    cannot hold.
    """
    (name, _), method = parse_spec(spec), build("adapter", spec)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    leaves = {path: leaf for path, leaf in flat.items() if isinstance(leaf, method.leaf_type)}
    bound = parameter_map.bind_parameters(lm, unsupported.table_of(source))
    found = {
        tensor_name.removesuffix(WEIGHT): tensor
        for tensor_name, tensor in parameter_map.disk_tensors(bound).items()
        if any(path in leaves for path, _, _ in tensor.parts)
    }
    written = unsupported.written_method(method, found)
    unsupported.check(name, written, found, source.config["model_type"])
    if written.peft.kind != "LORA":
        if form := full_delta.peft_form(written, leaves, found):
            tensors, config = form
            _save(pathlib.Path(folder), tensors, _common(written.peft.kind, found, source) | config)
        return
    apart = method.splits_kernel and not written.splits_kernel
    leaves = {path: _on_host(leaf, apart) for path, leaf in leaves.items()}
    if not distributed.is_main():
        return
    held = _Held(leaves, source.bind(lm), source, apart)
    arrays = {module: _module(tensor, held) for module, tensor in found.items()}
    leaf = next(iter(leaves.values()))
    tensors = {
        f"{PREFIX}{module}.{NAMES[part]}": value for module, found in arrays.items() for part, value in found.items()
    }
    _save(pathlib.Path(folder), tensors, _config(written, leaf, arrays, source))


def _on_host(leaf, with_base):
    """The leaf with its factors, and on demand what they are around, in every process's memory."""
    whole = {name: distributed.to_host(getattr(leaf, name)) for name in ("a", "b", "m") if hasattr(leaf, name)}
    return leaf.replace(base=distributed.to_host(leaf.base) if with_base else None, **whole)


def _module(tensor, held):
    """`{a, b, m}` of one adapter of peft's."""
    parts = [_part(path, position, held) for path, _, position in tensor.parts]
    ranks = [0 if part is None else part[0].shape[1] for part in parts]
    a = np.concatenate([part[0].T for part in parts if part is not None])
    blocks = []
    for i, (part, (_, (_, width_out), _)) in enumerate(zip(parts, tensor.parts, strict=True)):
        block = np.zeros((sum(ranks), width_out), np.float32)
        if part is not None:
            block[sum(ranks[:i]) : sum(ranks[: i + 1])] = part[1]
        blocks.append(block)
    found = {"a": a, "b": tensor.join(blocks)}
    if any(hasattr(held.leaves.get(path), "m") for path, _, _ in tensor.parts):
        found["m"] = tensor.join([_magnitude(path, position, held) for path, _, position in tensor.parts])
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


def _part(path, position, held):
    """`(a [in, R], b [R, out])` of one kernel, or None; with `apart`, of all that PiSSA changed since the start."""
    if path not in held.leaves:
        return None
    leaf = held.leaves[path]
    a, b = (np.asarray(value[position], np.float32) for value in (leaf.a, leaf.b))
    if not held.apart:
        return a, b
    before = _kernel(path, position, held) - np.asarray(leaf.base[position], np.float32)
    u, s, vt = np.linalg.svd(before, full_matrices=False)
    rank = a.shape[1]
    taken = u[:, :rank] * (s[:rank] / leaf.scale)
    return np.concatenate([a, taken], 1), np.concatenate([b, -vt[:rank]])


def _magnitude(path, position, held):
    """DoRA's magnitudes of a kernel; one without an adapter keeps its norms."""
    if path in held.leaves:
        return np.asarray(held.leaves[path].m[position], np.float32)
    return np.linalg.norm(_kernel(path, position, held), axis=0)


def _kernel(path, position, held):
    leaf = held.bound[path]
    index = [slice(i, i + 1) for i in position] + [slice(None)] * 2
    return leaf.read(held.source.tensors, tuple(index), np.float32)[(0,) * len(position)]


def _config(method, leaf, arrays, source):
    ranks = {module: found["a"].shape[0] for module, found in arrays.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]

    def alpha(rank):
        return round(leaf.scale * scale_divisor(method.peft.options, rank), 9)

    others = {module: own for module, own in ranks.items() if own != rank}
    return _common("LORA", ranks, source) | {
        "r": rank,
        "lora_alpha": alpha(rank),
        "rank_pattern": others,
        "alpha_pattern": {module: alpha(own) for module, own in others.items()},
        "lora_dropout": 0.0 if unsupported.has_experts(arrays) else leaf.dropout,
        **{"use_rslora": False, "use_dora": False, "init_lora_weights": True} | method.peft.options,
        "bias": "none",
    }


def _common(kind, modules, source):
    """What every adapter_config.json says."""
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.name or str(source.path),
        "target_modules": sorted(modules),
        "inference_mode": True,
    }


def _save(folder, tensors, config):
    """Writes an adapter's two files, whole or not at all."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TENSORS) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
    write_atomically(folder / CONFIG, json.dumps(config, indent=2))
