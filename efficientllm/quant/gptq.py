"""GPTQ (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1): each column's rounding error moves on to later columns."""

import functools

import jax
import jax.numpy as jnp

from efficientllm.quant import int4
from efficientllm.quant.rows import grouped

BLOCK = 128
HIGHEST = {"precision": "highest"}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gptq(rows_RK, hessian_KK, group, symmetric, damp=0.01):
    """`(codes [R, G, group], scale [R, G], zero)` of rows whose inputs have the second moments `hessian` (any factor).

    The scales of groups are those of the weights as they were, as in llmcompressor; the paper's code takes them from
    weights that earlier columns have changed. `damp` times the mean of the diagonal is added to it.
    """
    R, K = rows_RK.shape
    width = K + -K % max(BLOCK, group)
    scale_RG, zero_RG = int4.scales(grouped(rows_RK, group), symmetric)
    upper_KK, dead_K = _upper(_padded(hessian_KK, width), K, damp)
    w_RK = jnp.where(dead_K, 0, jnp.pad(rows_RK, [(0, 0), (0, width - K)]))
    by_column = lambda x_RG: jnp.pad(jnp.repeat(x_RG, group, 1), [(0, 0), (0, width)])[:, :width]  # noqa: E731
    scale_RK, zero_RK = by_column(scale_RG), None if zero_RG is None else by_column(zero_RG)

    def block(i, carry):
        w_RK, codes_RK = carry
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * BLOCK, slice_size=BLOCK, axis=1)
        upper_BK = jax.lax.dynamic_slice_in_dim(upper_KK, i * BLOCK, BLOCK, 0)
        codes_RB, errors_RB = _columns(
            cut(w_RK), cut(upper_BK), cut(scale_RK), None if zero_RK is None else cut(zero_RK)
        )
        later_K = jnp.arange(width) >= (i + 1) * BLOCK
        w_RK -= jnp.matmul(errors_RB, jnp.where(later_K, upper_BK, 0), **HIGHEST)
        return w_RK, jax.lax.dynamic_update_slice_in_dim(codes_RK, codes_RB, i * BLOCK, 1)

    _, codes_RK = jax.lax.fori_loop(0, width // BLOCK, block, (w_RK, jnp.zeros_like(w_RK)))
    G = scale_RG.shape[1]
    return codes_RK[:, : G * group].reshape(R, G, group), scale_RG, zero_RG


def _columns(w_RB, upper_BB, scale_RB, zero_RB):
    """The codes of a block's columns, one after the other, and their errors over the diagonal."""

    def column(i, carry):
        w_RB, codes_RB, errors_RB = carry
        w, scale, zero = w_RB[:, i], scale_RB[:, i], None if zero_RB is None else zero_RB[:, i]
        codes = int4.encode(w, scale, zero)
        error = (w - int4.decode(codes, scale, zero)) / upper_BB[i, i]
        later = jnp.where(jnp.arange(w_RB.shape[1]) >= i, upper_BB[i], 0)
        return w_RB - error[:, None] * later, codes_RB.at[:, i].set(codes), errors_RB.at[:, i].set(error)

    start = (w_RB, jnp.zeros_like(w_RB), jnp.zeros_like(w_RB))
    _, codes_RB, errors_RB = jax.lax.fori_loop(0, w_RB.shape[1], column, start)
    return codes_RB, errors_RB


def _padded(hessian_KK, width):
    """Inputs that there are not, of no moment."""
    more = width - hessian_KK.shape[0]
    return jnp.pad(hessian_KK, [(0, more), (0, more)])


def _upper(hessian_KK, K, damp):
    """The upper Cholesky factor of the inverse of the damped moments, and which inputs are always 0."""
    diagonal_K = jnp.diagonal(hessian_KK)
    dead_K = diagonal_K == 0
    diagonal_K = jnp.where(dead_K, 1, diagonal_K)
    mean = jnp.sum(jnp.where(jnp.arange(len(dead_K)) < K, diagonal_K, 0)) / K
    hessian_KK = hessian_KK + jnp.diag(dead_K + damp * mean)
    eye = jnp.eye(len(dead_K))
    inverse_KK = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian_KK), True), eye)
    return jnp.linalg.cholesky(inverse_KK).T, dead_K
