"""GGUF files (llama.cpp's) through the `gguf` package: metadata as a config.json, tensors dequantised one at a time."""

import functools
import importlib.util
import pathlib

import numpy as np

from efficientllm.convert import mapped, tables
from efficientllm.errors import UserError
from efficientllm.quant import checkpoints

# general.architecture -> (model_type, name table).
ARCHITECTURES = {
    "llama": ("llama", tables.GGUF_LLAMA),
    "qwen2": ("qwen2", tables.GGUF_QWEN),
    "qwen3": ("qwen3", tables.GGUF_QWEN),
}
# Keys behind `<architecture>.` and those of a config.json that they stand for.
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
ROPE_FACTORS = "rope_freqs.weight"  # what each pair's frequency is divided by (llama3 scaling, worked out)


class GGUFFile:
    """The tensors and the metadata of one file.

    `config` is what its config.json would be, `table` the name table. Raises UserError for a file that is no GGUF, or
    of an architecture that is not known.
    """

    def __init__(self, file):
        self.where = pathlib.Path(file)
        gguf = package(self.where)
        try:
            reader = gguf.GGUFReader(self.where)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            # numpy's order: GGUF counts the fastest axis first
            self.shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in self._tensors.items()}
            self._places = {name: (int(t.data_offset), t.data.dtype, t.data.shape) for name, t in self._tensors.items()}
            values = {
                key: _value(field) for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.tok")
            }
        except Exception as error:  # the package raises whatever its parsing stumbles over
            raise UserError(f"{self.where}: no GGUF file that can be read ({type(error).__name__}: {error})") from None
        self._check_size()
        self._types = {name: tensor.tensor_type for name, tensor in self._tensors.items()}
        del self._tensors, reader
        self.chat_template = values.get("tokenizer.chat_template")
        self.config, self.table = self._describe(values)

    def _check_size(self):
        size = self.where.stat().st_size
        for name, tensor in self._tensors.items():
            if tensor.data_offset + tensor.n_bytes > size:
                raise UserError(f"{self.where}: tensor {name!r} ends behind the end of the file: it is cut short")

    def _describe(self, values):
        architecture = values.get("general.architecture")
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{self.where}: general.architecture = {architecture!r} is none of {known}")
        model_type, table = ARCHITECTURES[architecture]
        prefix = f"{architecture}."
        config = {"model_type": model_type, "tie_word_embeddings": "output.weight" not in self.shapes}
        given = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        rotated = given.pop("rope.dimension_count", None)
        config |= self._rope(given)
        for key, value in given.items():
            if key == "attention.value_length" and value == given.get("attention.key_length"):
                continue
            config[KEYS.get(key, f"{prefix}{key}")] = value  # an unknown one is refused as unknown keys are
        config.setdefault("vocab_size", self.shapes.get("token_embd.weight", (None,))[0])
        head_dim = config.get("head_dim") or config.get("hidden_size", 0) // max(
            config.get("num_attention_heads", 1), 1
        )
        if rotated not in (None, head_dim):
            raise UserError(
                f"{self.where}: {prefix}rope.dimension_count = {rotated} is not supported: heads of ours turn whole"
            )
        if model_type == "llama" and "blk.0.attn_q.bias" in self.shapes:
            config["attention_bias"] = True
        config |= {
            key: values[f"tokenizer.ggml.{name}"] for name, key in SPECIAL.items() if f"tokenizer.ggml.{name}" in values
        }
        return config, table

    def _rope(self, given):
        """`rope_scaling` of a config.json; takes its keys out of `given`."""
        factor = given.pop("rope.scaling.factor", None)
        kind = given.pop("rope.scaling.type", "linear" if factor else "none")  # as llama.cpp takes a factor alone
        original = given.pop("rope.scaling.original_context_length", None)
        if ROPE_FACTORS in self.shapes:
            if kind != "none" and factor not in (None, 1.0):
                raise UserError(
                    f"{self.where}: rope.scaling.factor = {factor:g} is not supported together with {ROPE_FACTORS!r}"
                )
            factors = [float(value) for value in self.read(ROPE_FACTORS)]
            scaling = {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
            }
            return {"rope_scaling": scaling | {"original_max_position_embeddings": given.get("context_length")}}
        if kind == "none":
            return {}
        return {"rope_scaling": {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}}

    def dtype(self, name):
        """float32: what every tensor is dequantised to."""
        return np.dtype(np.float32)

    def read(self, name):
        """The tensor in float32."""
        return self._dequantised(name)

    def stored(self, name):
        """The leaf of a tensor whose blocks ours can multiply as they are, in numpy, or None."""
        kind = self._types[name].name
        if kind not in ("Q4_0", "Q4_1", "Q8_0"):
            return None
        offset, dtype, shape = self._places[name]
        blocks = mapped.array(self.where, offset, dtype, shape)
        return checkpoints.from_gguf(kind, blocks.reshape(shape[0], self.shapes[name][1] // 32, -1))

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def _dequantised(self, name):
        import gguf

        offset, dtype, shape = self._places[name]
        stored = mapped.array(self.where, offset, dtype, shape)
        try:
            return gguf.dequantize(stored, self._types[name]).reshape(self.shapes[name])
        except NotImplementedError as error:
            raise UserError(f"{self.where}: tensor {name!r} cannot be read: {error}") from None


def package(where):
    """The `gguf` package. Raises UserError saying how to get it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{where} is read with the package gguf; pip install gguf")
    import gguf

    return gguf


def _value(field):
    return field.contents() if len(field.data) < 2**10 else None
