"""Scaled dot-product attention through XLA, for keys and values of equal or unequal width."""

import jax
import jax.numpy as jnp


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    bias_BHTS: jax.Array | None,
    mask_B1TS: jax.Array,
    scale: float,
) -> jax.Array:
    """Computes `jax.nn.dot_product_attention`, also for values that are not as wide as keys -> `[B, T, H, V]`."""
    if q_BTHK.shape[-1] == v_BSGV.shape[-1]:
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGV, bias=bias_BHTS, mask=mask_B1TS, scale=scale, implementation="xla"
        )
    return _unequal_heads(q_BTHK, k_BSGK, v_BSGV, bias_BHTS, mask_B1TS, scale)


def _unequal_heads(q_BTHK, k_BSGK, v_BSGV, bias_BHTS, mask_B1TS, scale):
    B, T, H, K = q_BTHK.shape
    # H = G r: the r query heads of each KV head are a dimension of their own, as in the einsums.
    q_BTGrK = q_BTHK.reshape(B, T, k_BSGK.shape[2], -1, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGrK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1) * scale
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    weights_BHTS = jax.nn.softmax(jnp.where(mask_B1TS, scores_BHTS, jnp.finfo(jnp.float32).min), -1)
    weights = weights_BHTS.astype(v_BSGV.dtype).reshape(scores.shape)
    return jnp.einsum("bgrts,bsgv->btgrv", weights, v_BSGV).reshape(B, T, H, -1)
