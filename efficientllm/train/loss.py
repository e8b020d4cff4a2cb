"""Next-token cross-entropy that never holds the logits of a long row of a large vocabulary."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from efficientllm import kernels
from efficientllm.sharding import constrain, current_mesh, spec
from efficientllm.weights import matmul

CHUNK_BYTES = 2**25  # float32 logits a device holds at a time


def nll_sum(x_BTD, head_DV, batch, precision):
    """Negative log likelihood (nats) summed over the weighted targets; logits are `x_BTD @ head_DV`.

    Logits of more than CHUNK_BYTES are made, used and dropped a chunk of tokens at a time. The gradient is made in the
    same visit (as in Liger, arXiv:2410.10989, Section 3.2), so no product is done twice.
    """
    chunks = _chunks(*x_BTD.shape[:2], head_DV.shape[1])
    kernels.note("loss", "whole" if chunks == 1 else "chunked")
    if chunks == 1:
        return logits_nll_sum(_logits(x_BTD, head_DV, precision), batch["targets"], batch["weights"])
    return _chunked(x_BTD, head_DV, batch["targets"], batch["weights"], precision, chunks)


def logits_nll_sum(logits_BTV, targets_BT, weights_BT):
    """`nll_sum` from the logits.

    The target's logit is picked by comparison, not by a gather: the vocabulary may be split over devices.
    """
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), -1)
    return jnp.sum((jax.nn.logsumexp(logits_BTV, -1) - target_BT) * weights_BT)


def _logits(x_BTD, head_DV, precision):
    return constrain(matmul(x_BTD, head_DV, precision, out_dtype=jnp.float32), "batch", None, "vocab")


def _chunks(B, T, V):
    """Chunks of a row: the fewest of which one holds CHUNK_BYTES at most, or a token."""
    mesh, logits = current_mesh(), (B, 1, V)
    if mesh is not None:
        logits = NamedSharding(mesh, spec(("batch", None, "vocab"), logits, mesh)).shard_shape(logits)
    tokens = max(1, CHUNK_BYTES // (4 * math.prod(logits)))
    return -(-T // tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(x_BTD, head_DV, targets_BT, weights_BT, precision, chunks):
    def one(total, chunk):
        x, targets, weights = chunk
        return total + logits_nll_sum(_logits(x, head_DV, precision), targets, weights), None

    return jax.lax.scan(one, 0.0, _split(chunks, x_BTD, targets_BT, weights_BT))[0]


def _chunked_forward(x_BTD, head_DV, targets_BT, weights_BT, precision, chunks):
    def nll(x, head, targets, weights):
        return logits_nll_sum(_logits(x, head, precision), targets, weights)

    def one(carry, chunk):
        total, dhead_DV = carry
        x, targets, weights = chunk
        nats, (dx, dhead) = jax.value_and_grad(nll, (0, 1))(x, head_DV, targets, weights)
        return (total + nats, dhead_DV + dhead), dx

    carry = jnp.zeros(()), jnp.zeros(head_DV.shape, head_DV.dtype)
    (total, dhead_DV), dx = jax.lax.scan(one, carry, _split(chunks, x_BTD, targets_BT, weights_BT))
    dx_BTD = jnp.moveaxis(dx, 0, 1).reshape(x_BTD.shape[0], -1, x_BTD.shape[2])[:, : x_BTD.shape[1]]
    return total, (dx_BTD, dhead_DV)


def _chunked_backward(precision, chunks, gradients, dy):
    dx_BTD, dhead_DV = gradients
    return (dx_BTD * dy).astype(dx_BTD.dtype), (dhead_DV * dy).astype(dhead_DV.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _split(chunks, *leaves):
    """`[B, T, ...]` -> `[chunks, B, T / chunks, ...]`: every chunk lies on all devices.

    Zeros fill up the last chunk; those of the weights keep them out of the sum.
    """

    def one(leaf):
        B, T, *rest = leaf.shape
        padded = jnp.pad(leaf, ((0, 0), (0, -T % chunks), *((0, 0),) * len(rest)))
        return jnp.moveaxis(padded.reshape(B, chunks, -1, *rest), 1, 0)

    return tuple(map(one, leaves))
