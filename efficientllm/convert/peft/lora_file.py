"""LoRA in the file format of diffusers: `pytorch_lora_weights.safetensors`, which its pipelines load.

Tensors are PEFT's under `transformer.`; PEFT's config is JSON in the header's metadata, each key with that prefix. A
file without it has adapters of scale 1, as diffusers takes them.
"""

import json
import pathlib
import re
import typing
from collections.abc import Mapping

import numpy as np

from efficientllm.convert.files.safetensors_file import read_header, read_metadata
from efficientllm.errors import UserError
from efficientllm.runtime.atomic_write import replacing
from efficientllm.untrusted import files, json_text

NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"
_A = ".lora_A.weight"


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, typing.Any]) -> None:
    """Writes the tensors of `{module.lora_A.weight: array}` and PEFT's config (a dict) to a folder, atomically."""
    from safetensors.numpy import save_file

    packed = {f"{PREFIX}{key}": value for key, value in config.items()}
    with replacing(folder / NAME) as draft:
        save_file(
            {f"{PREFIX}{name}": array for name, array in tensors.items()},
            draft,
            metadata={"format": "pt", _METADATA: json.dumps(packed, indent=2, sort_keys=True)},
        )


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The file at a path: the path itself, or the file of a folder without PEFT's own config; None for any other."""
    if path.suffix == ".safetensors" and files.is_file(path):
        return path
    folder = path
    return (
        folder / NAME if files.is_file(folder / NAME) and not files.is_there(folder / "adapter_config.json") else None
    )


def prefix_of(file: pathlib.Path) -> str:
    """What the names of a file's tensors begin with: nothing in one that a model saved, not a pipeline."""
    return PREFIX if any(name.startswith(PREFIX) for name in read_header(file)) else ""


def read_config(file: pathlib.Path) -> dict[str, typing.Any]:
    """Reads PEFT's config of a file (a dict), of its metadata or of its tensors. Raises UserError for a damaged one."""
    prefix, text = prefix_of(file), read_metadata(file).get(_METADATA)
    if text is not None:
        metadata = json_text.parse(text, f"{file}: {_METADATA} cannot be read")
        of_model = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        return {"peft_type": "LORA", **of_model}
    ranks = {
        name.removeprefix(prefix).removesuffix(_A): shape[0]
        for name, (_, shape, _) in read_header(file).items()
        if name.endswith(_A) and len(shape) == 2
    }
    if not ranks:
        raise UserError(f"{file}: no tensor in it is named MODULE{_A}: no LoRA in the format of diffusers")
    rank = max(ranks.values())
    other_ranks = {re.escape(module): number for module, number in ranks.items() if number != rank}
    has_magnitudes = any(name.endswith("lora_magnitude_vector") for name in read_header(file))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_dora": has_magnitudes}
    return config | {"rank_pattern": other_ranks, "alpha_pattern": other_ranks}
