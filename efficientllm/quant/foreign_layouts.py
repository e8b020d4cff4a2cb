"""Conversion of GPTQ, AWQ and GGUF weights (AutoGPTQ, AutoAWQ, llama.cpp) to quantized leaves, bit for bit."""

import numpy as np

from efficientllm.errors import UserError
from efficientllm.quant.int4 import Int4
from efficientllm.quant.int8 import Int8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each four bits of a word, lowest first
SHIFTS: np.ndarray = 4 * np.arange(8, dtype=np.uint32)


def from_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None = None,
    version: int = 1,
    group: int | None = None,
    symmetric: bool | None = None,
) -> Int4:
    """Convert AutoGPTQ's tensors: qweight int32 `[k / 8, r]`, qzeros `[g, r / 8]`, scales float16 `[g, r]`.

    A word of qweight holds eight inputs, a word of qzeros eight outputs, lowest bits first. Raises UserError where a
    group is not a run of inputs (desc_act without a static order); `gptq_rows` reads such tensors.

    Args:
      g_idx: the group of each input; None for runs of `group` inputs.
      version: the format's version: 1 stores zero - 1, 2 stores zero.
      group: the group size, which the last group may not fill; None divides the inputs into equal groups.
      symmetric: `sym` of the file; None where the file has none.
    """
    codes_kr, zeros_gr = _gptq_codes(qweight, qzeros, version, symmetric)
    inputs, groups = len(codes_kr), len(scales)
    group = group or -(-inputs // groups)
    if -(-inputs // group) != groups:
        raise UserError(f"{groups} groups of {group} inputs do not make {inputs}")
    if g_idx is not None and not np.array_equal(g_idx, np.arange(inputs) // group):
        raise UserError("a GPTQ checkpoint with desc_act: its groups are not runs of inputs, which no product here has")
    return _leaf(codes_kr, zeros_gr, scales, group)


def gptq_rows(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray,
    version: int = 1,
    symmetric: bool | None = None,
) -> np.ndarray:
    """Dequantize AutoGPTQ's tensors, whose groups may be in any order, to float32 `[r, k]`."""
    codes_kr, zeros_gr = _gptq_codes(qweight, qzeros, version, symmetric)
    if not ((g_idx >= 0) & (g_idx < len(scales))).all():
        raise UserError(f"g_idx names other groups than the {len(scales)} that there are")
    weights_kr = (codes_kr.astype(np.float32) - zeros_gr[g_idx]) * np.asarray(scales, np.float32)[g_idx]
    return np.ascontiguousarray(weights_kr.T)


def _gptq_codes(qweight, qzeros, version, symmetric):
    """The codes `[k, r]` and zero points `[g, r]`.

    The zero point of symmetric int4 is 8. Files of either version exist that store it as the other version does;
    kernels that read no zeros multiply both alike.
    """
    # [k / 8, r, 8] -> [k / 8, 8, r] -> [k, r] for weights; [g, r / 8, 8] -> [g, r] for zeros.
    codes_kr = _words(qweight).transpose(0, 2, 1).reshape(-1, qweight.shape[1])
    stored_gr = _words(qzeros).reshape(qzeros.shape[0], -1)
    if symmetric is not False and any((stored_gr == zero).all() for zero in (7, 8)):
        return codes_kr, np.full_like(stored_gr, 8)
    if symmetric:
        raise UserError("sym is true, but its zeros are not all 8, stored as 7 or 8")
    return codes_kr, stored_gr + (version == 1)


def from_awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> Int4:
    """Convert AutoAWQ's GEMM tensors: qweight int32 `[k, r / 8]`, qzeros `[g, r / 8]`, scales float16 `[g, r]`.

    A word holds eight outputs, in `AWQ_ORDER`.
    """
    place = np.argsort(AWQ_ORDER)
    codes_kr, zeros_gr = (_words(words)[..., place].reshape(len(words), -1) for words in (qweight, qzeros))
    return _leaf(codes_kr, zeros_gr, scales)


def from_gguf(kind: str, blocks: np.ndarray) -> Int4 | Int8:
    """Convert llama.cpp's Q4_0, Q4_1 or Q8_0 blocks, uint8 `[r, k / 32, bytes]`, to a kernel; its `.T` is the table."""
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    columns = blocks.shape[1] * 32
    if kind == "Q8_0":
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(blocks), -1)
        return Int8(values, scale.astype(np.float32), columns)
    if kind == "Q4_0":
        return Int4(blocks[..., 2:].reshape(len(blocks), -1), scale, columns=columns)
    if kind == "Q4_1":
        minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
        return Int4(blocks[..., 4:].reshape(len(blocks), -1), scale, minimum=minimum, columns=columns)
    raise UserError(f"GGUF blocks of type {kind}: only Q4_0, Q4_1 and Q8_0 are kept as they are")


def _words(words):
    """The eight codes of each word, lowest first."""
    return np.ascontiguousarray(words).view(np.uint32)[..., None] >> SHIFTS & 15


def _leaf(codes_kr, zeros_gr, scales_gr, group=None):
    inputs, outputs = codes_kr.shape
    groups = len(scales_gr)
    group = group or inputs // groups
    if group % 2:
        raise UserError(f"groups of {group} inputs are not even, as two codes in a byte need them")
    filled = np.pad(codes_kr.T.astype(np.uint8), ((0, 0), (0, groups * group - inputs)))
    low, high = np.split(filled.reshape(outputs, groups, group), 2, axis=-1)
    zero = None if (zeros_gr == 8).all() else zeros_gr.T.astype(np.uint8)
    return Int4((low | high << 4).reshape(outputs, -1), np.asarray(scales_gr, np.float16).T, zero, columns=inputs)
