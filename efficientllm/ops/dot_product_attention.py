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
    by_kv_head: bool = False,
) -> jax.Array:
    """Computes `jax.nn.dot_product_attention`, also for values that are not as wide as keys -> `[B, T, H, V]`.

    With `by_kv_head` products are batches of matrices, a KV head's queries together: the form for one CPU device.
    """
    if by_kv_head:
        return _by_kv_head(q_BTHK, k_BSGK, v_BSGV, bias_BHTS, mask_B1TS, scale)
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


def _by_kv_head(q_BTHK, k_BSGK, v_BSGV, bias_BHTS, mask_B1TS, scale):
    """Multiplies `[r T, K] @ [K, S]` and `[r T, S] @ [S, V]` for each KV head, H = G r, into float32.

    XLA for CPUs turns the products of `jax.nn.dot_product_attention` around: it copies all weights transposed, and
    multiplies bfloat16 weights in float32. 288 queries of 9 heads over 321 keys take 3.6 ms of it and 2.0 ms here, and
    1,024 of 4 heads in bfloat16 27 and 10 ms (AMD EPYC, Zen 4, jax 0.10.2).
    """
    (B, T, H, K), (S, G, V) = q_BTHK.shape, v_BSGV.shape[1:]
    # One dimension of batches, N = B G: with two, XLA multiplies bfloat16 in float32. Rows of a batch are t = r T.
    q_NtK = q_BTHK.reshape(B, T, G, -1, K).transpose(0, 2, 3, 1, 4).reshape(B * G, -1, K)
    k_NSK, v_NSV = (x_BSGK.swapaxes(1, 2).reshape(B * G, S, -1) for x_BSGK in (k_BSGK, v_BSGV))
    scores_NtS = jnp.einsum("ntk,nsk->nts", q_NtK, k_NSK, preferred_element_type=jnp.float32)
    scores_BHTS = scores_NtS.reshape(B, H, T, S) * scale
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    weights_BHTS = jax.nn.softmax(jnp.where(mask_B1TS, scores_BHTS, jnp.finfo(jnp.float32).min), -1)
    weights_NtS = weights_BHTS.astype(v_BSGV.dtype).reshape(B * G, -1, S)
    y_NtV = jnp.einsum("nts,nsv->ntv", weights_NtS, v_NSV, preferred_element_type=jnp.float32)
    y_BGrTV = y_NtV.astype(q_BTHK.dtype).reshape(B, G, -1, T, V)
    return y_BGrTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, V)
