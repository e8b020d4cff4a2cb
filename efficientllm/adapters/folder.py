"""Adapters as folders that peft reads and writes: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import os
import pathlib
import re

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from efficientllm import model
from efficientllm.adapters.base import KERNEL, attach, is_box, merge
from efficientllm.adapters.dora import DoRA
from efficientllm.adapters.lora import LoRA
from efficientllm.convert import binding, families, mapped
from efficientllm.convert.safetensors_file import read_header
from efficientllm.convert.write import export
from efficientllm.errors import UserError, did_you_mean
from efficientllm.registry import build, parse

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What peft calls each of our arrays, and how it lies there.
NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
# Keys of adapter_config.json that change what is computed, and the only value of each that we compute.
NEUTRAL = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "alpha_pattern": {}, "rank_pattern": {},
    "modules_to_save": None, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    "use_qalora": False, "use_bdlora": None, "arrow_config": None, "alora_invocation_tokens": None, "kasa_config": None,
}  # fmt: skip


def is_writable(spec):
    """Whether peft has a folder for the adapter `spec`."""
    return parse(spec)[0] in ("lora", "rslora", "dora", "pissa", "lora_plus")


def write(lm, spec, params, folder, source):
    """Writes the adapters among `params` to `folder`, whole or not at all.

    `spec` is `config.adapter`, `source` the checkpoint around which they were tuned. Raises UserError for a kernel
    that is only part of a tensor there (peft would adapt the whole of it).
    """
    from safetensors.numpy import save_file

    name, _ = parse(spec)
    leaves, tensors, modules = _leaves(params), {}, set()
    for module, path, position in _modules(lm, source, leaves):
        modules.add(module)
        for ours, theirs in NAMES.items():
            if (value := getattr(leaves[path], ours, None)) is not None:
                tensors[f"{PREFIX}{module}.{theirs}"] = np.ascontiguousarray(np.asarray(value[position]).T)
    rank = next(iter(leaves.values())).a.shape[-1]
    scale = next(iter(leaves.values())).scale
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.path),
        "r": rank,
        "lora_alpha": round(scale * (rank**0.5 if name == "rslora" else rank), 9),
        "lora_dropout": next(iter(leaves.values())).dropout,
        "use_rslora": name == "rslora",
        "use_dora": name == "dora",
        "init_lora_weights": "pissa" if name == "pissa" else True,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{TENSORS}-{os.getpid()}"
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def read_spec(folder):
    """The `config.adapter` of a folder of peft's. Raises UserError for what we do not compute."""
    file = pathlib.Path(folder) / CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no object")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}; only LORA can be read")
    for key, neutral in NEUTRAL.items():
        if config.get(key) not in (neutral, None, False) and config.get(key) != neutral:
            raise UserError(f"{file}: {key} = {config[key]!r} is not supported; only {neutral!r} is")
    initial = config.get("init_lora_weights", True)
    if config.get("use_dora"):
        name = "dora"
    elif initial == "pissa":
        name = "pissa"
    else:
        name = "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_rslora") and name != "rslora":
        raise UserError(f"{file}: use_rslora together with {name} is not supported")
    if initial == "pissa" and name != "pissa":
        raise UserError(f"{file}: init_lora_weights = 'pissa' together with {name} is not supported")
    if initial not in (True, False, "gaussian", "pissa"):
        raise UserError(f"{file}: init_lora_weights = {initial!r} changes the base model in a way that is not known")
    rank = _number(config, "r", file, int)
    alpha, dropout = _number(config, "lora_alpha", file), _number(config, "lora_dropout", file, default=0.0)
    return f"{name}(rank={rank}, alpha={alpha}, dropout={dropout})"


def _number(config, key, file, kind=float, default=None):
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UserError(f"{file}: {key} = {value!r} must be a number ({kind.__name__})")
    return value


def read(lm, params, folder, source):
    """`params`, whose adapters `attach` has made, with the arrays of a folder of peft's in them.

    A layer that the folder does not adapt, of a stack that it does, gets an adapter that adds nothing. Raises UserError
    naming the tensor that is missing, belongs to nothing, or has another shape; and for a layer without an adapter
    where the method has none that adds nothing.
    """
    file, (name, _) = pathlib.Path(folder) / TENSORS, parse(read_spec(folder))
    found = _tensors(file)
    leaves, used = _leaves(params), set()
    values = {path: {ours: np.zeros_like(np.asarray(getattr(leaf, ours))) for ours in NAMES if hasattr(leaf, ours)}
              for path, leaf in leaves.items()}  # fmt: skip
    for module, path, position in _modules(lm, source, leaves):
        tensors = {ours: f"{PREFIX}{module}.{NAMES[ours]}" for ours in values[path]}
        if not any(tensor in found for tensor in tensors.values()):
            _require_neutral(name, module, file)
            continue
        for ours, tensor in tensors.items():
            if tensor not in found:
                raise UserError(f"{file}: tensor {tensor!r} is missing{did_you_mean(tensor, found)}")
            slot = values[path][ours][position]
            if found[tensor].T.shape != slot.shape:
                raise UserError(
                    f"{file}: tensor {tensor!r} has shape {list(found[tensor].shape)}, the model asks for "
                    f"{list(slot.T.shape)}: an adapter of another model or rank"
                )
            values[path][ours][position] = found[tensor].T
            used.add(tensor)
    if left := sorted(set(found) - used):
        raise UserError(f"{file}: tensor {left[0]!r} belongs to nothing in the model")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path, arrays in values.items():
        put = {ours: jax.device_put(value, getattr(leaves[path], ours).sharding) for ours, value in arrays.items()}
        flat[path] = leaves[path].replace(**put)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def around(source, lm, params, folder):
    """`params` of `lm`, a checkpoint's, with the adapters of a folder of peft's around their kernels."""
    method, boxed = build("adapter", read_spec(folder)), model.abstract_params(lm)
    method = dataclasses.replace(method, target=_target(lm, source, pathlib.Path(folder) / TENSORS))
    held = jax.tree.map(lambda box, leaf: box.replace_boxed(leaf), boxed, params, is_leaf=is_box)
    wrapped = jax.jit(lambda held: nn.unbox(attach(method, boxed, held, jax.random.key(0))), donate_argnums=0)(held)
    return read(lm, wrapped, folder, source)


def merge_into(source, adapter, out, dtype=None):
    """Writes the checkpoint `source` with the adapter of a folder of peft's added to its kernels. Raises UserError."""
    lm = source.lm()
    abstract = nn.unbox(model.abstract_params(lm))
    merged = merge(around(source, lm, source.load(abstract), adapter))
    export(lm, merged, out, source, dtype=dtype or source.stored_dtype)


def _tensors(file):
    """`{name: array}` of a safetensors file. Raises UserError for one that is damaged or not there."""
    if not file.is_file():
        raise UserError(f"{file} is missing: no folder of an adapter")
    return {
        name: mapped.array(file, offset, dtype, shape) for name, (dtype, shape, offset) in read_header(file).items()
    }


def _target(lm, source, file):
    """A regex of our kernels that the folder adapts, in one layer at least. Raises UserError if there are none."""
    adapted = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in _tensors(file)}
    table = families.FAMILIES[source.config["model_type"]].table
    paths = [
        re.escape(path)
        for path, bound in binding.bind(lm, table).items()
        if KERNEL.search(path) and any(name.removesuffix(".weight") in adapted for _, name in bound.tensors())
    ]
    if not paths:
        raise UserError(f"{file}: no tensor of it belongs to a kernel of the model: an adapter of another model")
    return f"^({'|'.join(paths)})$"


def _require_neutral(name, module, file):
    """PiSSA takes its factors out of every layer of a stack, and no magnitude of DoRA's does nothing to all kernels."""
    if name in ("pissa", "dora"):
        raise UserError(f"{file}: {module} has no adapter, and {name} of ours adapts a kernel in all layers or in none")


def _leaves(params):
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if isinstance(leaf, LoRA | DoRA)}


def _modules(lm, source, leaves):
    """Yields `(module of the other model, our path, position in our leading axes)` of each adapted kernel."""
    table = families.FAMILIES[source.config["model_type"]].table
    for path, bound in binding.bind(lm, table).items():
        if path not in leaves:
            continue
        if len(bound.shapes) != 1:
            raise UserError(
                f"{path} is one of {len(bound.shapes)} parts of {bound.template!r}: peft has no adapter of a part"
            )
        for position, name in bound.tensors():
            yield name.removesuffix(".weight"), path, position
