"""GPTQ, AWQ and GGUF weights (AutoGPTQ's, AutoAWQ's, llama.cpp's layouts) converted to quantized leaves, bit for bit.

Letters: K inputs, N outputs, G groups of inputs.
"""

import numpy as np

from efficientllm.errors import UserError
from efficientllm.quant.int4 import Int4
from efficientllm.quant.int8 import Int8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each four bits of a word hold, lowest first
SHIFTS: np.ndarray = 4 * np.arange(8, dtype=np.uint32)


def from_gptq(qweight, qzeros, scales, g_idx=None, version=1, group=None, symmetric=None):
    """The kernel of AutoGPTQ's tensors: qweight int32 `[K / 8, N]`, qzeros `[G, N / 8]`, scales float16 `[G, N]`.

    Eight inputs are in a word of qweight and eight outputs in one of qzeros, lowest first. Raises UserError for groups
    that are no runs of inputs (desc_act without a static order): `gptq_rows` reads those.

    Args:
      g_idx: the group of each input; None: runs of `group` inputs.
      version: 1 of the format stores zero - 1, 2 the zero.
      group: inputs of a group, of which the last may have fewer; None: as many as the groups divide them into.
      symmetric: what the file says; None: nothing.
    """
    codes_KN, zeros_GN = _gptq_codes(qweight, qzeros, version, symmetric)
    K, G = len(codes_KN), len(scales)
    group = group or -(-K // G)
    if -(-K // group) != G:
        raise UserError(f"{G} groups of {group} inputs do not make {K}")
    if g_idx is not None and not np.array_equal(g_idx, np.arange(K) // group):
        raise UserError("a GPTQ checkpoint with desc_act: its groups are not runs of inputs, which no product here has")
    return _leaf(codes_KN, zeros_GN, scales, group)


def gptq_rows(qweight, qzeros, scales, g_idx, version=1, symmetric=None):
    """The weights `[N, K]` of AutoGPTQ's tensors in any order of groups, float32."""
    codes_KN, zeros_GN = _gptq_codes(qweight, qzeros, version, symmetric)
    if not ((g_idx >= 0) & (g_idx < len(scales))).all():
        raise UserError(f"g_idx names other groups than the {len(scales)} that there are")
    weights_KN = (codes_KN.astype(np.float32) - zeros_GN[g_idx]) * np.asarray(scales, np.float32)[g_idx]
    return np.ascontiguousarray(weights_KN.T)


def _gptq_codes(qweight, qzeros, version, symmetric):
    """`(codes [K, N], zeros [G, N])`. The zero of four symmetric bits is 8: files of either version that store it in
    the way of the other are known, and kernels that look no zeros up read both alike."""
    codes_KN = _words(qweight).transpose(0, 2, 1).reshape(-1, qweight.shape[1])
    stored_GN = _words(qzeros).reshape(qzeros.shape[0], -1)
    if symmetric is not False and any((stored_GN == zero).all() for zero in (7, 8)):
        return codes_KN, np.full_like(stored_GN, 8)
    if symmetric:
        raise UserError("sym is true, but its zeros are not all 8, stored as 7 or 8")
    return codes_KN, stored_GN + (version == 1)


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


def _leaf(codes_KN, zeros_GN, scales_GN, group=None):
    K, N = codes_KN.shape
    G = len(scales_GN)
    group = group or K // G
    if group % 2:
        raise UserError(f"groups of {group} inputs are not even, as two codes in a byte need them")
    filled = np.pad(codes_KN.T.astype(np.uint8), ((0, 0), (0, G * group - K)))
    low, high = np.split(filled.reshape(N, G, group), 2, axis=-1)
    zero = None if (zeros_GN == 8).all() else zeros_GN.T.astype(np.uint8)
    return Int4((low | high << 4).reshape(N, -1), np.asarray(scales_GN, np.float16).T, zero, columns=K)
