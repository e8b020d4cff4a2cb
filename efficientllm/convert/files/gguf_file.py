"""GGUF files (llama.cpp) through the `gguf` package: metadata as a config.json, tensors dequantized one at a time."""

import functools
import math
import os
import pathlib
import re
import typing

import numpy as np

from efficientllm.convert.files import memory_map
from efficientllm.convert.hf_config import value_limits
from efficientllm.convert.tensors import name_tables
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError, short_repr
from efficientllm.quant import consistency, foreign_layouts
from efficientllm.untrusted import files, gguf_header

# general.architecture -> (model_type, name table).
ARCHITECTURES = {
    "llama": ("llama", name_tables.GGUF_LLAMA),
    "qwen2": ("qwen2", name_tables.GGUF_QWEN),
    "qwen3": ("qwen3", name_tables.GGUF_QWEN),
}
# GGUF keys without their prefix `<architecture>.` -> keys of a config.json.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
NUMBERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
FORMS = ("Q4_0", "Q4_1", "Q8_0")  # formats that our matrix products use without conversion
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 10_000
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # a number, or one per block
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies (llama3 scaling, precomputed)


class GGUFFile(TensorReader):
    """Tensors and metadata of a GGUF file, or of all parts of a split one (`NAME-00001-of-00003.gguf`).

    `where` is the first part, which has the metadata; `config` is the equivalent config.json, `table` the name table.
    Raises UserError for a file that is no GGUF or has an unknown architecture.
    """

    def __init__(self, file: str | os.PathLike[str]):
        headers = _headers(pathlib.Path(file))
        self.where, values = next((file, header.values) for file, header in headers.items())
        kinds = gguf_header.package(self.where).GGMLQuantizationType
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, pathlib.Path] = {}
        self._types, self._places = {}, {}
        for path, header in headers.items():
            for name, tensor in header.tensors.items():
                if name in self.shapes:
                    raise UserError(f"{path}: tensor {short_repr(name)} is in {self._files[name].name} too")
                self.shapes[name], self._types[name], self._files[name] = tensor.shape, kinds(tensor.kind), path
                self._places[name] = _place(tensor, self._types[name].name)
        template = values.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self.config, self.table = self._describe(values)

    def _describe(self, values):
        architecture = values.get("general.architecture")
        if str(architecture) not in ARCHITECTURES:
            architectures = ", ".join(ARCHITECTURES)
            raise UserError(
                f"{self.where}: general.architecture = {short_repr(architecture)} is none of {architectures}"
            )
        model_type, table = ARCHITECTURES[architecture]
        prefix = f"{architecture}."
        config = {"model_type": model_type, "tie_word_embeddings": "output.weight" not in self.shapes}
        entries = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if missing := [key for key in _NEEDED if key not in entries]:
            raise UserError(f"{self.where}: key {prefix}{missing[0]} is missing")
        if longest := [key for key, value in entries.items() if value is None]:
            raise UserError(f"{self.where}: {prefix}{longest[0]} is an array of 1,024 entries or more; none is known")
        entries |= {key: self._of_all(entries, key, prefix) for key in _PER_LAYER if key in entries}
        rotated = entries.pop("rope.dimension_count", None)
        config |= self._rope(entries)
        for key, value in entries.items():
            if key == "attention.value_length" and value == entries.get("attention.key_length"):
                continue
            config[KEYS.get(key, f"{prefix}{key}")] = value  # an unknown one is refused as unknown keys are
        value_limits.check_values(config, self.where)
        config.setdefault("num_key_value_heads", config["num_attention_heads"])  # where llama.cpp has other defaults
        config.setdefault("head_dim", config["hidden_size"] // max(config["num_attention_heads"], 1))
        config.setdefault("vocab_size", self.shapes.get("token_embd.weight", (None,))[0])
        head_dim = config.get("head_dim") or config.get("hidden_size", 0) // max(
            config.get("num_attention_heads", 1), 1
        )
        if rotated not in (None, head_dim):
            raise UserError(
                f"{self.where}: {prefix}rope.dimension_count = {rotated} is not supported: whole heads are rotated here"
            )
        if model_type == "llama" and "blk.0.attn_q.bias" in self.shapes:
            config["attention_bias"] = True
        config |= {
            key: values[f"tokenizer.ggml.{name}"] for name, key in SPECIAL.items() if f"tokenizer.ggml.{name}" in values
        }
        return config, table

    def _of_all(self, entries, key, prefix):
        """The common value of a key with one entry per block. Raises UserError if blocks differ."""
        value, layers = entries[key], entries["block_count"]
        if not isinstance(value, list):
            return value
        if len(value) != layers or not value:
            raise UserError(f"{self.where}: {prefix}{key} has {len(value)} entries for {short_repr(layers)} blocks")
        if any(number != value[0] for number in value):
            raise UserError(
                f"{self.where}: {prefix}{key} = {short_repr(value)} is not supported: every block has the same here"
            )
        return value[0]

    def _rope(self, entries):
        """`rope_scaling` of a config.json; removes its keys from `entries`."""
        factor = entries.pop("rope.scaling.factor", None)
        value_limits.check_values({"factor": factor}, f"{self.where}: rope.scaling")
        kind = entries.pop("rope.scaling.type", "linear" if factor else "none")  # as llama.cpp takes a factor alone
        original = entries.pop("rope.scaling.original_context_length", None)
        if ROPE_FACTORS in self.shapes:
            if kind != "none" and factor not in (None, 1.0):
                raise UserError(
                    f"{self.where}: rope.scaling.factor = {factor:g} is not supported together with {ROPE_FACTORS!r}"
                )
            if len(self.shapes[ROPE_FACTORS]) != 1 or self.shapes[ROPE_FACTORS][0] > value_limits.LONGEST:
                raise UserError(f"{self.where}: {ROPE_FACTORS!r} has shape {list(self.shapes[ROPE_FACTORS])}")
            factors = [float(value) for value in self.read(ROPE_FACTORS)]
            scaling = {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
            }
            return {"rope_scaling": scaling | {"original_max_position_embeddings": entries.get("context_length")}}
        if kind == "none":
            return {}
        return {"rope_scaling": {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}}

    def dtype(self, name: str) -> np.dtype:
        """float32: every tensor is dequantized."""
        return np.dtype(np.float32)

    def form(self, name: str) -> str:
        """The stored format of a tensor: `Q4_1`, `F16`."""
        return self._types[name].name

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32."""
        return self._dequantised(name)

    def stored(self, name: str) -> typing.Any:
        """The quantized leaf of a tensor in one of FORMS, in numpy, or None."""
        kind = self.form(name)
        if kind not in FORMS:
            return None
        offset, dtype, shape = self._places[name]
        blocks = memory_map.map_array(self._files[name], offset, dtype, shape)
        leaf = foreign_layouts.from_gguf(kind, blocks.reshape(shape[0], self.shapes[name][1] // 32, -1))
        try:
            consistency.check_finite(leaf)
        except UserError as error:
            raise UserError(f"{self.where}: tensor {name!r}: {error}") from None
        return leaf

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def _dequantised(self, name):
        import gguf

        offset, dtype, shape = self._places[name]
        stored = memory_map.map_array(self._files[name], offset, dtype, shape)
        try:
            return gguf.dequantize(stored, self._types[name]).reshape(self.shapes[name])
        except NotImplementedError as error:
            raise UserError(f"{self.where}: tensor {name!r} cannot be read: {error}") from None


def _headers(file):
    """`{file: Header}` of a file, or of all its parts in order. Raises UserError for a missing part."""
    match = _PART.fullmatch(file.name)
    header = gguf_header.read_header(file)
    if match is None or header.values.get("split.count", 1) in (0, 1):
        return {file: header}
    name, count = match[1], int(match[3])
    if header.values["split.count"] != count or count > _MOST_PARTS:
        raise UserError(
            f"{file}: it says that it is one of {short_repr(header.values['split.count'])} parts, not {count}"
        )
    paths = [file.with_name(f"{name}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    for path in paths:
        if not files.is_there(path):
            raise UserError(f"{path} is missing: {file.name} is one of {count} parts, which lie beside each other")
    return {path: header if path == file else gguf_header.read_header(path) for path in paths}


def _place(tensor, kind):
    """`(offset, dtype, shape)` of a tensor's stored numbers, or of the bytes of its blocks."""
    if kind in NUMBERS:
        return tensor.offset, NUMBERS[kind], tensor.shape
    *rows, _ = tensor.shape
    return tensor.offset, np.dtype(np.uint8), (*rows, tensor.size // math.prod(rows))
