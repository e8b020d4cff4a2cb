"""GPTQ (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1): each column's rounding error moves on to later columns."""

import functools

import jax
import jax.numpy as jnp

from efficientllm.quant import int4

HIGHEST = {"precision": "highest"}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gptq(rows_RK, hessian_KK, group, symmetric, damp=0.01):
    """`(codes [R, G, group], scale [R, G], zero)` of rows whose inputs have the second moments `hessian` (any factor).

    A group's scale is taken when its turn comes, from weights that the columns before it have changed, as the paper's
    code takes it: fixed beforehand it would clip those that have grown. `damp` times the mean of the diagonal is added
    to it. Columns of a group are a block of the paper's lazy updates.
    """
    R, K = rows_RK.shape
    width = K + -K % group
    upper_KK, dead_K = _upper(_padded(hessian_KK, width), K, damp)
    w_RK = jnp.where(dead_K, 0, jnp.pad(rows_RK, [(0, 0), (0, width - K)]))

    def round_group(w_RK, start):
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=group, axis=1)
        upper_BK = jax.lax.dynamic_slice_in_dim(upper_KK, start, group, 0)
        scale_R, zero_R = int4.scales(cut(w_RK), symmetric)
        codes_RB, errors_RB = _columns(cut(w_RK), cut(upper_BK), scale_R, zero_R)
        later_K = jnp.arange(width) >= start + group
        w_RK -= jnp.matmul(errors_RB, jnp.where(later_K, upper_BK, 0), **HIGHEST)
        return w_RK, (codes_RB, scale_R, zero_R)

    _, groups = jax.lax.scan(round_group, w_RK, jnp.arange(0, width, group))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), groups)


def _columns(w_RB, upper_BB, scale_R, zero_R):
    """The codes of a group's columns, one after the other, and their errors over the diagonal."""

    def column(i, carry):
        w_RB, codes_RB, errors_RB = carry
        w = w_RB[:, i]
        codes = int4.encode(w, scale_R, zero_R)
        error = (w - int4.decode(codes, scale_R, zero_R)) / upper_BB[i, i]
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
