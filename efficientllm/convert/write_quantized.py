"""Writes quantized checkpoints in our own format, which `files.own_quantized` reads."""

import dataclasses
import json
import os

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from efficientllm import model as models
from efficientllm.convert import write
from efficientllm.convert.files.new_folder import new_folder
from efficientllm.convert.files.own_quantized import METHOD, leaf_types
from efficientllm.convert.files.safetensors_file import INDEX
from efficientllm.convert.source import Source
from efficientllm.cost import available_memory
from efficientllm.errors import UserError
from efficientllm.quant import apply, calibrate
from efficientllm.quant.base import Rows, rounds


def convert_quantized(
    source: Source,
    spec: str,
    folder: str | os.PathLike[str],
    data: str = "python_docs()",
    length: int = 256,
    shard: int = write.SHARD,
) -> int:
    """Quantizes `source` as `spec` into a new folder; returns the bytes of its weights.

    Calibrated methods use text of `data`. Raises UserError for a `spec` that does not quantize.
    """
    form = apply.form_of(spec, "--quant")
    if not rounds(form) or spec == "stored":
        raise UserError(f"--quant={spec}: rounds nothing; take int4(...), int8(...), nf4(...), bfloat16 or float16")
    if form.leaf_type not in leaf_types().values():
        raise UserError(f"--quant={spec}: {type(form).__name__} names no leaf_type, by which files would be read again")
    lm = source.lm(scan=False)
    abstract = nn.unbox(models.abstract_params(lm))
    _check_memory(abstract, spec, form.calibrated)
    if form.calibrated:
        from efficientllm.data import build_tokenizer, calibration_rows

        tokens_BT = calibration_rows(data, build_tokenizer(source.tokenizer(), data), length)
        params = calibrate.quantize(lm, source.load(abstract, lm=lm), spec, tokens_BT)
    else:
        params = source.load(abstract, lm=lm, transform=apply.rounder(spec))
    with new_folder(folder) as new:
        _write(params, new, source.config, spec, shard)
        write.write_tokenizer(new, source, None)
    return sum(array.nbytes for array in jax.tree.leaves(params))


def _check_memory(abstract, spec, calibrated):
    """Memory: all quantized weights plus the largest original one; calibration holds all originals."""
    whole, rounded = (_sizes(params) for params in (abstract, apply.abstract(abstract, spec)))
    available_memory.check_conversion(sum(whole) if calibrated else sum(rounded) + max(whole), f"--quant={spec}")


def _sizes(params):
    return [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)]


def _write(params, folder, config, spec, shard):
    from safetensors.numpy import save_file

    tensors, leaves = {}, {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        arrays, statics = _parts(leaf)
        tensors |= {f"{path}.{name}" if name else path: array for name, array in arrays.items()}
        if statics is not None:
            leaves[path] = {"leaf": type(leaf).__name__} | statics
    files = write.files_of({name: array.nbytes for name, array in tensors.items()}, shard)
    for file, names in files.items():
        save_file({name: np.asarray(tensors[name]) for name in names}, folder / file)
    if len(files) > 1:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / INDEX).write_text(json.dumps(index))
    description = {"quant_method": METHOD, "form": spec, "leaves": leaves}
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": description}, indent=1))


def _parts(leaf):
    """Splits a leaf into `({field: array}, {field: other value})`; a plain array gives `({"": array}, None)`."""
    if not isinstance(leaf, Rows):
        return {"": leaf}, None
    fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    arrays = {name: value for name, value in fields.items() if hasattr(value, "dtype")}
    return arrays, {name: value for name, value in fields.items() if name not in arrays and value is not None}
