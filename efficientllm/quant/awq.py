"""AWQ: activation-aware scales for int4 weights (Lin et al. 2023, arXiv:2306.00978, Section 3.2)."""

import functools

import jax
import jax.numpy as jnp

from efficientllm.quant import int4
from efficientllm.quant.base import into_groups

GRID = 20  # exponents that the search tries, as in the paper's code


@functools.partial(jax.jit, static_argnums=(3, 4))
def awq(rows_rk: jax.Array, hessian_kk: jax.Array, mean_k: jax.Array, group: int, symmetric: bool) -> jax.Array:
    """Search AWQ's factors s `[k]`: rows are multiplied by s before rounding, inputs are divided by s.

    The candidates are s = mean^e / (weight^(1 - e) + 1e-4) (llmcompressor's duo scaling) and s = mean^e (the paper's
    Eq. 5) for e = 0, 1/20, ..., 19/20, each divided by the geometric mean of its extremes. The candidate with the least
    mean squared output error wins. llmcompressor measures the output of the block that follows, and shares s among
    products of the same input; here each product has its own s.

    Args:
      hessian_kk: the second moments of the inputs.
      mean_k: the mean absolute value of each input; `weight` is that of its weights (`_sizes`).
    """
    ratio_c = jnp.tile(jnp.arange(GRID) / GRID, 2)
    is_duo_c = jnp.arange(2 * GRID) < GRID
    weight_k = _sizes(rows_rk, group)

    def candidate(ratio, is_duo):
        plain_k = mean_k**ratio
        s_k = jnp.clip(jnp.where(is_duo, plain_k / (weight_k ** (1 - ratio) + 1e-4), plain_k), 1e-4)
        return representable(s_k / jnp.sqrt(jnp.max(s_k) * jnp.min(s_k)))

    def loss(s_k):
        return output_error(rows_rk - rounded(rows_rk * s_k, group, symmetric) / s_k, hessian_kk)

    s_ck = jax.vmap(candidate)(ratio_c, is_duo_c)
    return s_ck[jnp.argmin(jax.lax.map(loss, s_ck))]


def representable(s_k: jax.Array) -> jax.Array:
    """Round factors to inverses of float16 numbers: inputs are multiplied by the float16 inverse."""
    return 1 / (1 / s_k).astype(jnp.float16).astype(jnp.float32)


def rounded(rows_rk: jax.Array, group: int, symmetric: bool) -> jax.Array:
    """Round rows to the nearest int4 weights, float32 `[r, k]`."""
    codes, scale, zero = int4.nearest(rows_rk, group, symmetric)
    weights = int4.decode(codes, scale[..., None], None if zero is None else zero[..., None])
    return weights.reshape(rows_rk.shape[0], -1)[:, : rows_rk.shape[1]]


def output_error(change_rk: jax.Array, hessian_kk: jax.Array) -> jax.Array:
    """Compute the mean square of `x @ change.T` over inputs with the second moments `hessian_kk`."""
    return jnp.mean(jnp.sum(jnp.matmul(change_rk, hessian_kk, precision="highest") * change_rk, -1))


def _sizes(rows_rk, group):
    """The mean over rows of each weight's absolute value, relative to the largest of its group: `[k]`."""
    groups = jnp.abs(into_groups(rows_rk, group))
    relative = groups / (jnp.max(groups, -1, keepdims=True) + 1e-6)
    return jnp.mean(relative.reshape(rows_rk.shape[0], -1), 0)[: rows_rk.shape[1]]
