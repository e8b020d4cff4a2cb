"""AWQ (Lin et al. 2023, arXiv:2306.00978, Section 3.2): inputs that are large get finer steps."""

import functools

import jax
import jax.numpy as jnp

from efficientllm.quant import int4
from efficientllm.quant.base import into_groups

GRID = 20


@functools.partial(jax.jit, static_argnums=(3, 4))
def awq(rows_RK, hessian_KK, mean_K, group, symmetric):
    """The factors s `[K]` that the rows are multiplied with before they are rounded, and inputs divided by.

    Of s = mean^r / (weight^(1 - r) + 1e-4) (llmcompressor's duo scaling) and s = mean^r (the paper's Eq. 5), r = 0,
    1/20, ..., each over the geometric mean of its extremes, the one that changes the outputs least, by their mean
    square under the moments `hessian` of the inputs. `mean` are the means of the inputs' sizes; `weight` those of the
    weights' sizes in their groups. llmcompressor measures the output of the block that follows, and lets products of
    the same input share s; here each has its own.
    """
    ratio_C = jnp.tile(jnp.arange(GRID) / GRID, 2)
    is_duo_C = jnp.arange(2 * GRID) < GRID
    weight_K = _sizes(rows_RK, group)

    def candidate(ratio, is_duo):
        plain_K = mean_K**ratio
        s_K = jnp.clip(jnp.where(is_duo, plain_K / (weight_K ** (1 - ratio) + 1e-4), plain_K), 1e-4)
        return representable(s_K / jnp.sqrt(jnp.max(s_K) * jnp.min(s_K)))

    def loss(s_K):
        return output_error(rows_RK - rounded(rows_RK * s_K, group, symmetric) / s_K, hessian_KK)

    s_CK = jax.vmap(candidate)(ratio_C, is_duo_C)
    return s_CK[jnp.argmin(jax.lax.map(loss, s_CK))]


def representable(s_K):
    """The nearest factors whose inverses, by which inputs are multiplied, are float16 numbers."""
    return 1 / (1 / s_K).astype(jnp.float16).astype(jnp.float32)


def rounded(rows_RK, group, symmetric):
    """The rows, rounded to nearest."""
    codes, scale, zero = int4.nearest(rows_RK, group, symmetric)
    weights = int4.decode(codes, scale[..., None], None if zero is None else zero[..., None])
    return weights.reshape(rows_RK.shape[0], -1)[:, : rows_RK.shape[1]]


def output_error(change_RK, hessian_KK):
    """Mean square of `x @ change.T` for inputs with the second moments `hessian`."""
    return jnp.mean(jnp.sum(jnp.matmul(change_RK, hessian_KK, precision="highest") * change_RK, -1))


def _sizes(rows_RK, group):
    groups = jnp.abs(into_groups(rows_RK, group))
    relative = groups / (jnp.max(groups, -1, keepdims=True) + 1e-6)
    return jnp.mean(relative.reshape(rows_RK.shape[0], -1), 0)[: rows_RK.shape[1]]
