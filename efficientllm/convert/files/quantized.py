"""Reader of quantized Hugging Face folders: block-wise float8, GPTQ, AWQ; `own_quantized` reads those we write.

`read` dequantizes one tensor at a time; `stored` returns the codes as a quantized leaf. Letters: K inputs, N outputs.
"""

import contextlib
import json
import os
import pathlib
import typing

import ml_dtypes
import numpy as np

from efficientllm.convert.files import own_quantized
from efficientllm.convert.files.safetensors_file import SafetensorsFolder
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError
from efficientllm.quant import foreign_layouts

KEY = "quantization_config"
WEIGHT = ".weight"
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_LARGEST_BLOCK = 1 << 16
SCALES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


_PARTS = ("text_config", "llm_config")  # of a vision-language model's config.json
_DECISIVE = ("quant_method", "bits", "group_size", "version", "desc_act", "sym", "checkpoint_format")


def lift_quantization(config: dict[str, typing.Any], where: str | os.PathLike[str]) -> dict[str, typing.Any]:
    """Returns a config.json with its `quantization_config` at the top, where the language model's part may have it.

    Raises UserError where both have one, and they differ.
    """
    for name in _PARTS:
        part = config.get(name)
        inner = part.get(KEY) if isinstance(part, dict) else None
        if not inner:
            continue
        top = config.get(KEY) or inner
        if _decisive(top) != _decisive(inner):
            raise UserError(
                f"{where}: {KEY} = {json.dumps(top)}, {name}.{KEY} = {json.dumps(inner)}: differ; keep the one that "
                "describes the files"
            )
        config = config | {KEY: top, name: {key: value for key, value in part.items() if key != KEY}}
    return config


def _decisive(quantization):
    """The values that say how a tensor is stored."""
    is_dict = isinstance(quantization, dict)
    return {key: quantization.get(key) for key in _DECISIVE} if is_dict else quantization


def open_folder(
    path: pathlib.Path, config: dict[str, typing.Any]
) -> "SafetensorsFolder | BlockFloat8Folder | PackedInt4Folder | own_quantized.OwnQuantizedFolder":
    """Opens the tensors of a folder with this config.json. Raises UserError for an unknown quantization."""
    quantization = config.get(KEY)
    if not quantization:
        return SafetensorsFolder(path)
    kind = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if kind == "fp8":
        return BlockFloat8Folder(path, quantization)
    if kind in ("gptq", "awq"):
        return PackedInt4Folder(path, quantization)
    if kind == own_quantized.METHOD:
        return own_quantized.OwnQuantizedFolder(path, quantization)
    raise _refusal(
        path, quantization, "known are quant_method fp8 (with weight_block_size), gptq, awq and efficientllm"
    )


def _refusal(path, quantization, because):
    return UserError(
        f"{path / 'config.json'}: {KEY} = {json.dumps(quantization)} is not supported: {because}; take the unquantized "
        "model, which config.quant quantizes"
    )


class BlockFloat8Folder(TensorReader):
    """DeepSeek-V3's float8 weights `[N, K]` with a scale per block in `weight_scale_inv` (arXiv:2412.19437, 3.3.2)."""

    suffix = "_scale_inv"

    def __init__(self, path: pathlib.Path, quantization: dict[str, typing.Any]):
        self._files, self.where = SafetensorsFolder(path), path
        self._block = quantization.get("weight_block_size")
        sizes = self._block if isinstance(self._block, list) else []
        if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _LARGEST_BLOCK for size in sizes):
            raise _refusal(path, quantization, "weight_block_size must be two numbers")
        shapes = self._files.shapes
        self.shapes = {name: shape for name, shape in shapes.items() if not name.endswith(self.suffix)}
        for name, shape in self.shapes.items():
            if self._files.dtype(name) in FLOAT8:
                self._check(path, name, shape, shapes.get(name + self.suffix))

    def _check(self, path, name, shape, stored):
        if len(shape) != 2:
            raise UserError(f"{path}: tensor {name!r} has shape {list(shape)}; blocks of float8 are of two axes")
        expected = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        if stored != expected:
            state = "missing" if stored is None else f"of shape {list(stored)}"
            raise UserError(f"{path}: tensor {name + self.suffix!r} is {state}; {name!r} needs {list(expected)}")

    def dtype(self, name: str) -> np.dtype:
        """The dtype before quantization: bfloat16."""
        dtype = self._files.dtype(name)
        return np.dtype(ml_dtypes.bfloat16) if dtype in FLOAT8 else dtype

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, dequantized to float32."""
        codes = self._files.read(name)
        if codes.dtype not in FLOAT8:
            return codes
        factors: np.ndarray = self._files.read(name + self.suffix).astype(np.float32)
        for axis, block in enumerate(self._block):
            factors = factors.repeat(min(block, codes.shape[axis]), axis)
        return codes.astype(np.float32) * factors[: codes.shape[0], : codes.shape[1]]

    def stored(self, name: str) -> typing.Any:
        """None: we have no leaf for block-wise float8."""
        return None


class PackedInt4Folder(TensorReader):
    """AutoGPTQ's and AutoAWQ's files: `qweight`, `qzeros` and `scales` instead of a kernel's `weight`."""

    def __init__(self, path: pathlib.Path, quantization: dict[str, typing.Any]):
        self._files, self.where, self._kind = SafetensorsFolder(path), path, quantization["quant_method"]
        if quantization.get("bits") != 4:
            raise _refusal(path, quantization, "bits must be 4")
        if self._kind == "awq" and (version := str(quantization.get("version", "gemm")).lower()) != "gemm":
            raise _refusal(path, quantization, f"version {version!r}; only gemm's layout is known")
        self._version = self._version_of(path, quantization)
        self._symmetric, group = quantization.get("sym"), quantization.get("group_size")
        if group is not None and not (type(group) is int and (group == -1 or group > 0)):
            raise _refusal(path, quantization, "group_size must be a positive number, or -1 for one group")
        self._group, self._ordered = group, self._kind == "gptq" and bool(quantization.get("desc_act"))
        shapes = self._files.shapes
        self._packed = {name.removesuffix(".qweight") + WEIGHT for name in shapes if name.endswith(".qweight")}
        suffixes = ("qweight", "qzeros", "scales", "g_idx")
        packed_parts = {f"{name.removesuffix(WEIGHT)}.{suffix}" for name in self._packed for suffix in suffixes}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in packed_parts}
        self.shapes |= {name: self._shape(name) for name in self._packed}

    def _version_of(self, path, quantization):
        """Format version: AutoGPTQ's first format stores zero - 1, gptqmodel's second does not."""
        version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        if self._kind == "gptq" and (version not in ("gptq", "gptq_v2") or quantization.get("is_marlin_format")):
            raise _refusal(
                path, quantization, f"checkpoint_format {version!r}; only those of gptq and gptq_v2 are known"
            )
        return 2 if version == "gptq_v2" else 1

    def _part(self, name, suffix, needed=True):
        full = f"{name.removesuffix(WEIGHT)}.{suffix}"
        if full in self._files.shapes:
            return self._files.read(full)
        if needed:
            raise UserError(f"{self.where}: tensor {full!r} is missing")
        return None

    def _shape(self, name):
        full = f"{name.removesuffix(WEIGHT)}.qweight"
        shape = self._files.shapes[full]
        if len(shape) != 2 or 0 in shape or self._files.dtype(full) != np.int32:
            raise UserError(f"{self.where}: tensor {full!r} of {self._files.dtype(full)} {list(shape)} is no I32 table")
        rows, columns = shape
        return (columns, rows * 8) if self._kind == "gptq" else (columns * 8, rows)

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype; float16, the scales' dtype, for packed kernels."""
        return np.dtype(np.float16) if name in self._packed else self._files.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; packed kernels as `[N, K]` float32."""
        if name not in self._packed:
            return self._files.read(name)
        words, g_idx = self._words(name)
        if g_idx is None or self._kind == "awq":
            return np.asarray(self.stored(name).rows())
        with self._named(name):
            return foreign_layouts.gptq_rows(*words, g_idx, self._version, self._symmetric)

    def stored(self, name: str) -> typing.Any:
        """The `Int4` of a packed kernel `[N, K]` in numpy, or None."""
        if name not in self._packed:
            return None
        words, g_idx = self._words(name)
        with self._named(name):
            if self._kind == "awq":
                return foreign_layouts.from_awq(*words)
            group = self._inputs(name, len(words[2]))
            return foreign_layouts.from_gptq(*words, g_idx, self._version, group, self._symmetric)

    def _words(self, name):
        """`((qweight, qzeros, scales), g_idx or None)`, with checked shapes."""
        words = [self._part(name, suffix) for suffix in ("qweight", "qzeros", "scales")]
        self._check_parts(name, *words)
        g_idx = self._part(name, "g_idx", needed=False) if self._kind == "gptq" else None
        if g_idx is None and self._ordered:
            raise UserError(f"{self.where}: {name!r}: desc_act is true, but g_idx, the group of each input, is missing")
        if g_idx is not None and (g_idx.shape != (self._shape(name)[1],) or g_idx.dtype.kind != "i"):
            raise UserError(f"{self.where}: {name!r}: g_idx {list(g_idx.shape)} does not name a group of each input")
        return words, g_idx

    def _inputs(self, name, groups):
        """Group size: inputs that share a scale."""
        K = self._shape(name)[1]
        return K if groups == 1 or self._group == -1 else self._group or K // groups

    @contextlib.contextmanager
    def _named(self, name):
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.where}: {name!r}: {error}") from None

    def _check_parts(self, name, codes, zeros, scales):
        N, K = self._shape(name)
        groups = scales.shape[0] if scales.ndim == 2 else 0
        size = self._inputs(name, groups) if groups else 0
        whole = K % groups == 0 if groups and (self._kind == "awq" or self._group is None) else True
        fits = groups and whole and -(-K // size) == groups and size % 2 == 0 and scales.shape[1] == N
        if not fits or N % 8 or zeros.shape != (groups, N // 8):
            raise UserError(
                f"{self.where}: {name!r}: qweight {list(codes.shape)}, qzeros {list(zeros.shape)} and scales "
                f"{list(scales.shape)} do not fit each other"
            )
        if zeros.dtype != np.int32 or scales.dtype not in SCALES:
            raise UserError(f"{self.where}: {name!r}: qzeros are {zeros.dtype}, scales {scales.dtype}, not I32 and F16")
        if not np.isfinite(scales.astype(np.float16)).all():
            raise UserError(f"{self.where}: {name!r}: scales hold NaN or infinity, or more than float16 does")
