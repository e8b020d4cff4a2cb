"""Attention in the kernels of cuDNN, on GPUs with 16-bit queries, keys and values."""

import contextlib
import typing

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from efficientllm.ops import rematerialization as remat
from efficientllm.ops.attention_mask import Mask

_WRITES_MASK_GRADIENT = hasattr(fused, "should_export_dbias")  # of the mask of `attend`: JAX 0.10
# What is added to masked scores: the numbers of JAX's own masks, whose differences cuDNN can represent.
MASKED = {jnp.dtype("bfloat16"): -(2.0**41), jnp.dtype("float16"): -(2.0**15)}


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """Computes attention of whole rows in any order -> `[B, T, H, V]`."""
    V = v_BSGV.shape[-1]
    width = max(q_BTHK.shape[-1], V)  # it wants heads of one width; zeros change no score
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) for x in (q_BTHK, k_BSGK, v_BSGV))
    options = {"scale": scale, "implementation": "cudnn"}
    if mask.segments_BT is None and mask.order == "causal":
        window = None if mask.window is None else (mask.window - 1, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, **options)
    elif mask.reads_all:
        y = jax.nn.dot_product_attention(q, k, v, **options)
    else:  # cuDNN has no window on both sides
        mask_B1TS = mask.dense(q.shape[1], k.shape[1])[:, None]
        if not _WRITES_MASK_GRADIENT:
            return jax.nn.dot_product_attention(q, k, v, mask=remat.name_mask(mask_B1TS), **options)[..., :V]
        # As numbers to add, which all layers share where `residual_policy` saves them: 134 MB at 8,192 tokens.
        bias_B1TS = remat.name_mask(jnp.where(mask_B1TS, 0, MASKED[q.dtype]).astype(q.dtype))
        with _without_bias_gradient():
            y = jax.nn.dot_product_attention(q, k, v, bias=bias_B1TS, **options)
    return y[..., :V]


@contextlib.contextmanager
def _without_bias_gradient() -> typing.Iterator[None]:
    """Context in which JAX 0.10 traces cuDNN attention without the gradient of its bias, here a mask without one.

    cuDNN would write it, as large as the mask, for every layer. JAX 0.12 leaves out that of a boolean mask.
    """
    export = fused.should_export_dbias
    fused.should_export_dbias = lambda *_: False
    try:
        yield
    finally:
        fused.should_export_dbias = export
