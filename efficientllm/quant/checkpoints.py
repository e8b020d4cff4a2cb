"""Weights that others have compressed, as leaves: AutoGPTQ's, AutoAWQ's and llama.cpp's layouts, bit for bit.

Letters: K inputs, N outputs, G groups of inputs.
"""

import numpy as np

from efficientllm.errors import UserError
from efficientllm.quant.int4 import Int4
from efficientllm.quant.int8 import Int8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each four bits of a word hold, lowest first
SHIFTS = 4 * np.arange(8, dtype=np.uint32)


def from_gptq(qweight, qzeros, scales, g_idx=None, version=1):
    """The kernel of AutoGPTQ's tensors: qweight int32 `[K / 8, N]`, qzeros `[G, N / 8]`, scales float16 `[G, N]`.

    Eight inputs are in a word of qweight and eight outputs in one of qzeros, lowest first. Version 1 of the format
    stores zero - 1. Raises UserError for groups that are no runs of inputs (desc_act without a static order).
    """
    codes_KN = _words(qweight).transpose(0, 2, 1).reshape(-1, qweight.shape[1])
    zeros_GN = _words(qzeros).reshape(qzeros.shape[0], -1) + (version == 1)
    group = codes_KN.shape[0] // len(scales)
    if g_idx is not None and not np.array_equal(g_idx, np.arange(len(codes_KN)) // group):
        raise UserError("a GPTQ checkpoint with desc_act: its groups are not runs of inputs, which no product here has")
    return _leaf(codes_KN, zeros_GN, scales)


def from_awq(qweight, qzeros, scales):
    """The kernel of AutoAWQ's GEMM tensors: qweight int32 `[K, N / 8]`, qzeros `[G, N / 8]`, scales float16 `[G, N]`.

    Eight outputs are in a word, in `AWQ_ORDER`.
    """
    place = np.argsort(AWQ_ORDER)
    codes_KN, zeros_GN = (_words(words)[..., place].reshape(len(words), -1) for words in (qweight, qzeros))
    return _leaf(codes_KN, zeros_GN, scales)


def from_gguf(kind, blocks):
    """The rows of llama.cpp's Q4_0, Q4_1 or Q8_0 blocks, uint8 `[N, K / 32, bytes]`; `.T` makes a table of them."""
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


def _leaf(codes_KN, zeros_GN, scales_GN):
    K, N = codes_KN.shape
    G = len(scales_GN)
    low, high = np.split(codes_KN.T.reshape(N, G, K // G).astype(np.uint8), 2, axis=-1)
    zero = None if (zeros_GN == 8).all() else zeros_GN.T.astype(np.uint8)
    return Int4((low | high << 4).reshape(N, -1), np.asarray(scales_GN, np.float16).T, zero, columns=K)
