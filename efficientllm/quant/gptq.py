"""GPTQ: int4 rounding that moves each column's error to later columns.

Frantar et al. 2022, arXiv:2210.17323, Algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp

from efficientllm.quant import int4

HIGHEST = {"precision": "highest"}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gptq(
    rows_rk: jax.Array, hessian_kk: jax.Array, group: int, symmetric: bool, damp: float = 0.01
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantize rows to `(codes [r, g, group], scale [r, g], zero [r, g] or None)`.

    A group's scale is computed when the scan reaches it, from weights that earlier columns have changed, as in the
    paper's code; a scale fixed in advance would clip weights that have grown. The columns of a group are a block of the
    paper's lazy batch updates.

    Args:
      hessian_kk: the second moments of the inputs, up to a factor.
      damp: this times the mean of the diagonal is added to the diagonal.
    """
    outputs, inputs = rows_rk.shape
    width = inputs + -inputs % group
    upper_kk, dead_k = _upper(_padded(hessian_kk, width), inputs, damp)
    w_rk = jnp.where(dead_k, 0, jnp.pad(rows_rk, [(0, 0), (0, width - inputs)]))

    def round_group(w_rk, start):
        # Columns b of this group; their errors [r, b] times the factor's rows [b, k] update the columns after them.
        columns = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=group, axis=1)
        upper_bk = jax.lax.dynamic_slice_in_dim(upper_kk, start, group, 0)
        scale_r, zero_r = int4.scales(columns(w_rk), symmetric)
        codes_rb, errors_rb = _columns(columns(w_rk), columns(upper_bk), scale_r, zero_r)
        later_k = jnp.arange(width) >= start + group
        w_rk -= jnp.matmul(errors_rb, jnp.where(later_k, upper_bk, 0), **HIGHEST)
        return w_rk, (codes_rb, scale_r, zero_r)

    _, groups = jax.lax.scan(round_group, w_rk, jnp.arange(0, width, group))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), groups)


def _columns(w_rb, upper_bb, scale_r, zero_r):
    """The codes of a group's columns, rounded in order, and their errors divided by the factor's diagonal."""

    def column(i, carry):
        w_rb, codes_rb, errors_rb = carry
        w = w_rb[:, i]
        codes = int4.encode(w, scale_r, zero_r)
        error = (w - int4.decode(codes, scale_r, zero_r)) / upper_bb[i, i]
        later = jnp.where(jnp.arange(w_rb.shape[1]) >= i, upper_bb[i], 0)
        return w_rb - error[:, None] * later, codes_rb.at[:, i].set(codes), errors_rb.at[:, i].set(error)

    start = (w_rb, jnp.zeros_like(w_rb), jnp.zeros_like(w_rb))
    _, codes_rb, errors_rb = jax.lax.fori_loop(0, w_rb.shape[1], column, start)
    return codes_rb, errors_rb


def _padded(hessian_kk, width):
    """Pad the moments with zeros for the inputs that fill up the last group."""
    padding = width - hessian_kk.shape[0]
    return jnp.pad(hessian_kk, [(0, padding), (0, padding)])


def _upper(hessian_kk, inputs, damp):
    """The upper Cholesky factor of the inverse of the damped moments, and a mask of the inputs that are always 0."""
    diagonal_k = jnp.diagonal(hessian_kk)
    dead_k = diagonal_k == 0
    diagonal_k = jnp.where(dead_k, 1, diagonal_k)
    mean = jnp.sum(jnp.where(jnp.arange(len(dead_k)) < inputs, diagonal_k, 0)) / inputs
    hessian_kk = hessian_kk + jnp.diag(dead_k + damp * mean)
    eye = jnp.eye(len(dead_k))
    inverse_kk = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian_kk), True), eye)
    return jnp.linalg.cholesky(inverse_kk).T, dead_k
