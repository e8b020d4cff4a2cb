"""Chunked cross-entropy: the loss of a large vocabulary without its logits in memory."""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from efficientllm.runtime import kernel_choice
from efficientllm.sharding import constrain, count_shards, current_mesh, is_alone, spec
from efficientllm.typing import Batch
from efficientllm.weights import Precision, TransposedKernel, axes, matmul

CHUNK_BYTES = 2**26  # of float32 logits on a device at a time
# Each chunk reads the head and adds to its gradient. Chunks of 2**25 bytes of a vocabulary of 151,936 move more memory
# than all layers do, by the programs that XLA compiles for an H200.
ACCELERATOR_CHUNK_BYTES = 2**29
# Of the logits as `_explicit_gradients` stores them. A step of 0.5b on 4 x 2,048 tokens reads and writes the head and
# its gradient in two chunks of these, 4 GB of the 99 that its program for an H100 moves; eight chunks move 13.
GPU_CHUNK_BYTES = 2**31


def nll_sum(x_BTD: jax.Array, head_DV: typing.Any, batch: Batch, precision: str | Precision) -> jax.Array:
    """Sums the negative log likelihood (nats) of the targets, times their weights; logits are `x_BTD @ head_DV`.

    Logits of more than CHUNK_BYTES are computed a chunk of tokens at a time and never stored. The forward pass of a
    chunk also computes its gradients (as in Liger, arXiv:2410.10989, Section 3.2), so no matmul is done twice. On one
    GPU it does so for whole logits too.
    """
    precision = Precision.of(precision)
    x_BTD, targets_BT, weights_BT = map(_pieces, (x_BTD, batch["targets"], batch["weights"]))
    is_explicit = _has_explicit_gradients(head_DV)
    stored = x_BTD.dtype if is_explicit else jnp.dtype(jnp.float32)
    chunks = count_chunks(*x_BTD.shape[:2], head_DV.shape[1], stored)
    kernel_choice.record_kernel("loss", "whole" if chunks == 1 else "chunked")
    with jax.named_scope("loss"):
        if chunks == 1 and not (is_explicit and is_alone()):
            return logits_nll_sum(_logits(x_BTD, head_DV, precision), targets_BT, weights_BT)
        return _chunked(x_BTD, head_DV, targets_BT, weights_BT, precision, chunks)


def nll_sum_and_misses(
    x_BTD: jax.Array, head_DV: typing.Any, batch: Batch, precision: str | Precision
) -> tuple[jax.Array, jax.Array]:
    """Computes `(nll_sum, whether each target is another token than the likeliest, [B, T])`; it has no gradient.

    The likeliest is the first of the highest logits, as in greedy decoding.
    """
    precision = Precision.of(precision)
    (B, T), x_BTD, targets_BT, weights_BT = x_BTD.shape[:2], *map(_pieces, (x_BTD, batch["targets"], batch["weights"]))
    chunks = count_chunks(*x_BTD.shape[:2], head_DV.shape[1])

    def add_chunk(total, chunk):
        x, targets, weights = chunk
        logits = _logits(x, head_DV, precision)
        return total + logits_nll_sum(logits, targets, weights), jnp.argmax(logits, -1) != targets

    with jax.named_scope("loss"):
        nats, misses = jax.lax.scan(add_chunk, 0.0, _split(chunks, x_BTD, targets_BT, weights_BT))
    misses_BT = jnp.moveaxis(misses, 0, 1).reshape(len(x_BTD), -1)[:, : x_BTD.shape[1]]
    return nats, jnp.moveaxis(misses_BT.reshape(-1, B, x_BTD.shape[1]), 0, 1).reshape(B, T)


def _pieces(leaf):
    """Reshapes rows sharded over `sequence` to one row for each shard: `[B, T, ...] -> [n B, T / n, ...]`.

    A sum over targets does not depend on the rows they are in.
    """
    (B, T, *rest), n = leaf.shape, count_shards("length", leaf.shape[1])
    if n == 1:
        return leaf
    pieces = jnp.moveaxis(leaf.reshape(B, n, T // n, *rest), 1, 0).reshape(n * B, T // n, *rest)
    return constrain(pieces, "token_rows", None, *(None for _ in rest))


def logits_nll_sum(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Computes `nll_sum` from logits.

    The target's logit is selected by comparison, not by a gather: the vocabulary may be sharded.
    """
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), -1)
    return jnp.sum((jax.nn.logsumexp(logits_BTV, -1) - target_BT) * weights_BT)


def _logits(x_BTD, head_DV, precision):
    return constrain(matmul(x_BTD, head_DV, precision, out_dtype=jnp.float32), "token_rows", None, "vocab")


def count_chunks(B: int, T: int, V: int, stored: typing.Any = jnp.float32) -> int:
    """Counts the chunks that `[B, T]` tokens of V logits of the dtype `stored` are computed in.

    It is the fewest chunks whose logits take at most the platform's bytes on a device; a chunk has a token at least.
    """
    mesh, logits = current_mesh(), (B, 1, V)
    if mesh is not None:
        logits = NamedSharding(mesh, spec(("token_rows", None, "vocab"), logits, mesh)).shard_shape(logits)
    most = {"cpu": CHUNK_BYTES, "gpu": GPU_CHUNK_BYTES}.get(kernel_choice.platform(), ACCELERATOR_CHUNK_BYTES)
    tokens = max(1, most // (jnp.dtype(stored).itemsize * math.prod(logits)))
    return -(-T // tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(x_BTD, head_DV, targets_BT, weights_BT, precision, chunks):
    def add_chunk(total, chunk):
        x, targets, weights = chunk
        return total + logits_nll_sum(_logits(x, head_DV, precision), targets, weights), None

    return jax.lax.scan(add_chunk, 0.0, _split(chunks, x_BTD, targets_BT, weights_BT))[0]


def _chunked_forward(x_BTD, head_DV, targets_BT, weights_BT, precision, chunks):
    """Computes the loss and, as residuals, its gradients.

    Each of the N groups of rows accumulates a gradient of the head, and the groups are summed at the end: one
    all-reduce for all chunks, instead of one for each chunk.
    """
    names, is_explicit = axes(head_DV, (None, "vocab")), _has_explicit_gradients(head_DV)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), head_DV)
    if is_explicit:  # rounded once, not for each chunk
        head_DV = jax.tree.map(lambda leaf: leaf.astype(precision.product), head_DV)
    # All-gathered before the loop: not every compiler hoists the all-gather out of it.
    head_DV = jax.tree.map(lambda leaf, names: constrain(leaf, *names), head_DV, names)
    row_axes = _row_axes(len(x_BTD))
    N = 1 if row_axes is None else math.prod(current_mesh().shape[axis] for axis in row_axes)

    compute = functools.partial(_explicit_gradients if is_explicit else _gradients_by_autodiff, precision)
    of_groups = jax.vmap(compute, in_axes=(0, None, 0, 0), spmd_axis_name=row_axes)

    def in_groups(dhead_NDV):
        return jax.tree.map(lambda leaf, names: constrain(leaf, "token_rows", *names), dhead_NDV, names)

    def add_chunk(carry, chunk):
        total, dhead_NDV = carry
        x, targets, weights = (leaf.reshape(N, -1, *leaf.shape[1:]) for leaf in chunk)
        nats_N, (dx, dhead) = of_groups(x, head_DV, targets, weights)
        dhead_NDV = in_groups(jax.tree.map(jnp.add, dhead_NDV, dhead))
        return (total + jnp.sum(nats_N), dhead_NDV), dx.reshape(chunk[0].shape)

    carry = jnp.zeros(()), in_groups(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (N, *leaf.shape)), zeros))
    (total, dhead_NDV), dx = jax.lax.scan(add_chunk, carry, _split(chunks, x_BTD, targets_BT, weights_BT))
    dx_BTD = jnp.moveaxis(dx, 0, 1).reshape(x_BTD.shape[0], -1, x_BTD.shape[2])[:, : x_BTD.shape[1]]
    return total, (dx_BTD, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), dhead_NDV))


def _gradients_by_autodiff(precision, x_BTD, head_DV, targets_BT, weights_BT):
    """Computes `(nats, (gradient of x, gradient of the head))` of a chunk."""

    def nll(x_BTD, head_DV):
        logits_BTV = constrain(matmul(x_BTD, head_DV, precision, out_dtype=jnp.float32), None, None, "vocab")
        return logits_nll_sum(logits_BTV, targets_BT, weights_BT)

    return jax.value_and_grad(nll, (0, 1))(x_BTD, head_DV)


def _has_explicit_gradients(head_DV):
    return kernel_choice.platform() == "gpu" and isinstance(head_DV, jax.Array | TransposedKernel)


def _explicit_gradients(precision, x_BTD, head_DV, targets_BT, weights_BT):
    """Computes `_gradients_by_autodiff` with fewer passes over the logits.

    XLA for GPUs runs each reduction as a pass of its own. Here logits are written once and read twice: by one reduction
    to their log sum, and for their gradient, which is written once and read by two products. The target's logit is
    looked up. Logits are stored in the dtype of activations, as in Liger, and their gradient in that of products: all
    that is computed of them is float32. `head_DV` is in the dtype of products; its gradient is a sum in float32.
    """
    stored_BTV = constrain(matmul(x_BTD, head_DV, precision), None, None, "vocab")
    logits_BTV, targets_BT1 = stored_BTV.astype(jnp.float32), targets_BT[..., None]
    is_target_BTV = targets_BT1 == jnp.arange(logits_BTV.shape[-1])
    if count_shards("vocab", logits_BTV.shape[-1]) > 1:
        lse_BT = jax.nn.logsumexp(logits_BTV, -1)
        target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), -1)
    else:
        lse_BT = _logsumexp(logits_BTV)
        target_BT = jnp.take_along_axis(stored_BTV, targets_BT1, -1)[..., 0].astype(jnp.float32)
    dlogits_BTV = (jnp.exp(logits_BTV - lse_BT[..., None]) - is_target_BTV) * weights_BT[..., None]
    dlogits_BTV = dlogits_BTV.astype(precision.product)
    dx_BTD = matmul(dlogits_BTV, head_DV.T, precision, out_dtype=x_BTD.dtype)
    dlogits_NV, x_ND = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (dlogits_BTV, x_BTD.astype(precision.product)))
    pair = (dlogits_NV, x_ND) if isinstance(head_DV, TransposedKernel) else (x_ND, dlogits_NV)
    dhead = jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    dhead_DV = jax.tree.unflatten(jax.tree.structure(head_DV), [dhead])
    return jnp.sum((lse_BT - target_BT) * weights_BT), (dx_BTD, dhead_DV)


def _logsumexp(x):
    """Computes logsumexp over the last axis in one pass: a reduction of pairs (maximum, sum of exponentials less it).

    It has no gradient. See Milakov & Gimelshein 2018, arXiv:1805.02867, Eq. 4.
    """

    def combine(left, right):
        (m1, s1), (m2, s2) = left, right
        scale = jnp.exp(-jnp.abs(m1 - m2))
        return jnp.maximum(m1, m2), jnp.where(m1 > m2, s1 + s2 * scale, s1 * scale + s2)

    # The least number, not -inf: the difference of two of it is zero.
    start = jnp.finfo(x.dtype).min, jnp.zeros((), x.dtype)
    highest, total = jax.lax.reduce((x, jnp.ones_like(x)), start, combine, (x.ndim - 1,))
    return highest + jnp.log(total)


def _row_axes(B):
    """Returns the mesh axes that B rows are sharded over, or None."""
    mesh = current_mesh()
    axes = None if mesh is None else spec(("token_rows",), (B,), mesh)[0]
    return (axes,) if isinstance(axes, str) else axes


def _chunked_backward(precision, chunks, gradients, dy):
    dx_BTD, dhead_DV = gradients
    scaled = jax.tree.map(lambda leaf: (leaf * dy).astype(leaf.dtype), (dx_BTD, dhead_DV))
    return *scaled, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _split(chunks, *leaves):
    """Splits tokens into chunks, `[B, T, ...] -> [chunks, B, T / chunks, ...]`, so that each chunk is on all devices.

    The last chunk is padded with zeros; their weights are zero too.
    """

    def split_leaf(leaf):
        B, T, *rest = leaf.shape
        padded = jnp.pad(leaf, ((0, 0), (0, -T % chunks), *((0, 0),) * len(rest)))
        return jnp.moveaxis(padded.reshape(B, chunks, -1, *rest), 1, 0)

    return tuple(map(split_leaf, leaves))
