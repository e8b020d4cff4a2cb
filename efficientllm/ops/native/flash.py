"""Native attention of whole rows on CPUs with AVX2 or AVX-512, and its gradients (Dao et al. 2022, arXiv:2205.14135).

Scores of a block of queries stay in the second cache, and products and exponentials are float32. XLA writes the scores
of all pairs of a chunk to memory, several times in each pass.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import sharding
from efficientllm.ops.native import matmul
from efficientllm.runtime import kernel_choice

TARGET, GRADIENTS = matmul.ATTENTION


def is_usable() -> bool:
    """Tells whether the traced program may call the kernel: it runs on one CPU device that has the instructions."""
    return sharding.is_alone() and kernel_choice.platform() == "cpu" and bool(matmul.attention_instruction_sets())


def occupies(heads: int) -> bool:
    """Tells whether so many heads of rows keep the cores busy in the backward pass, where each is one core's work."""
    return 2 * heads >= len(os.sched_getaffinity(0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    query_segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    scale: float,
    is_causal: bool,
    window: int = 0,
) -> jax.Array:
    """Computes softmax attention -> `[B, T, H, V]` in the dtype of q.

    A query reads the keys of its segment, without segments all; none after itself if `is_causal`; and only the
    `window` nearest to each side, itself included, where that is not 0. Each must read a key. Arrays are float32 or
    bfloat16, and H is a multiple of G. Needs `is_usable()`.
    """
    return _forward(q_BTHK, k_BSGK, v_BSGV, query_segments_BT, key_segments_BS, scale, is_causal, window)[0]


def _attributes(scale, is_causal, window):
    best = matmul.attention_instruction_sets()[-1]
    return {
        "scale": np.float32(scale),
        "is_causal": bool(is_causal),
        "window": np.int64(window),
        "instructions": best,
    }


def _forward(q_BTHK, k_BSGK, v_BSGV, query_segments_BT, key_segments_BS, scale, is_causal, window):
    B, T, H, _ = q_BTHK.shape
    none = jnp.zeros((0, 0), jnp.int32)
    segments = [none if ids is None else ids.astype(jnp.int32) for ids in (query_segments_BT, key_segments_BS)]
    operands = (q_BTHK, k_BSGK, v_BSGV, *segments)
    shapes = (
        jax.ShapeDtypeStruct((B, T, H, v_BSGV.shape[-1]), q_BTHK.dtype),
        jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    )
    call = jax.ffi.ffi_call(TARGET, shapes, vmap_method="sequential")
    y_BTHV, sums_BHT = call(*operands, **_attributes(scale, is_causal, window))
    return y_BTHV, (*operands, y_BTHV, sums_BHT)


def _backward(scale, is_causal, window, residuals, dy_BTHV):
    q_BTHK, k_BSGK, v_BSGV, *_ = residuals
    B, S, G, _ = k_BSGK.shape
    H = q_BTHK.shape[2]
    # Where there are more cores than KV heads, each query head has gradients of its own, which are summed in float32.
    heads = G if occupies(B * G) else H
    dtype = k_BSGK.dtype if heads == G else jnp.float32
    shapes = (
        jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),
        *(jax.ShapeDtypeStruct((B, S, heads, x.shape[-1]), dtype) for x in (k_BSGK, v_BSGV)),
    )
    call = jax.ffi.ffi_call(GRADIENTS, shapes, vmap_method="sequential")
    dq, *of_heads = call(*residuals, dy_BTHV, **_attributes(scale, is_causal, window))
    dk, dv = (dx.reshape(B, S, G, heads // G, -1).sum(3).astype(k_BSGK.dtype) for dx in of_heads)
    return dq, dk, dv, None, None


attention.defvjp(_forward, _backward)
