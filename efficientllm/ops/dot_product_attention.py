"""Scaled dot-product attention through XLA, for keys and values of equal or unequal width."""

import functools

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
    1,024 of 4 heads in bfloat16 27 and 10 ms (AMD EPYC, Zen 4, 2 cores, jax 0.10.2, 2026-11-30).
    """
    (B, T, H, K), (S, G, V) = q_BTHK.shape, v_BSGV.shape[1:]
    # One dimension of batches, N = B G: with two, XLA multiplies bfloat16 in float32. Rows of a batch are t = r T.
    q_NtK = q_BTHK.reshape(B, T, G, -1, K).transpose(0, 2, 3, 1, 4).reshape(B * G, -1, K)
    k_NSK, v_NSV = (x_BSGK.swapaxes(1, 2).reshape(B * G, S, -1) for x_BSGK in (k_BSGK, v_BSGV))
    scores_NtS = _scores(q_NtK, k_NSK)
    scores_BHTS = scores_NtS.reshape(B, H, T, S) * scale
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    weights_BHTS = jax.nn.softmax(jnp.where(mask_B1TS, scores_BHTS, jnp.finfo(jnp.float32).min), -1)
    weights_NtS = weights_BHTS.astype(v_BSGV.dtype).reshape(B * G, -1, S)
    y_NtV = _weighted(weights_NtS, v_NSV)
    y_BGrTV = y_NtV.astype(q_BTHK.dtype).reshape(B, G, -1, T, V)
    return y_BGrTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, V)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _scores(q_NtK, k_NSK):
    """Multiplies queries with keys into float32; gradients are products of operands of their dtype."""
    return _einsum("ntk,nsk->nts", q_NtK, k_NSK)


def _scores_forward(q_NtK, k_NSK):
    return _scores(q_NtK, k_NSK), (q_NtK, k_NSK)


def _scores_backward(residuals, dscores_NtS):
    q_NtK, k_NSK = residuals
    dscores_NtS = dscores_NtS.astype(q_NtK.dtype)
    dq_NtK = _einsum("nts,nsk->ntk", dscores_NtS, k_NSK)
    return dq_NtK.astype(q_NtK.dtype), _sum_over_queries(dscores_NtS, q_NtK).astype(k_NSK.dtype)


@jax.custom_vjp
def _weighted(weights_NtS, v_NSV):
    """Sums values by their weights into float32; gradients are as those of `_scores`."""
    return _einsum("nts,nsv->ntv", weights_NtS, v_NSV)


def _weighted_forward(weights_NtS, v_NSV):
    return _weighted(weights_NtS, v_NSV), (weights_NtS, v_NSV)


def _weighted_backward(residuals, dy_NtV):
    weights_NtS, v_NSV = residuals
    dy_NtV = dy_NtV.astype(v_NSV.dtype)
    dweights_NtS = _einsum("ntv,nsv->nts", dy_NtV, v_NSV)
    return dweights_NtS.astype(weights_NtS.dtype), _sum_over_queries(weights_NtS, dy_NtV).astype(v_NSV.dtype)


def _sum_over_queries(pairs_NtS, x_NtK):
    """Computes `pairs.T @ x` for each batch, `[N, S, K]`, float32, as the transpose of `x.T @ pairs`.

    XLA for CPUs multiplies a transposed first operand slowly and in float32; the smaller one is turned, behind a
    barrier, else XLA would make it the product's own again.
    """
    x_NKt = jax.lax.optimization_barrier(x_NtK.swapaxes(1, 2))
    return jax.lax.optimization_barrier(_einsum("nkt,nts->nks", x_NKt, pairs_NtS)).swapaxes(1, 2)


_scores.defvjp(_scores_forward, _scores_backward)
_weighted.defvjp(_weighted_forward, _weighted_backward)
