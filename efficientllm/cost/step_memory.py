"""What a training step holds in memory, from its shapes alone: no array is made and nothing is compiled.

Parameters and optimiser, gradients of what learns, and what the forward pass leaves for the backward pass. The last is
the closure of the loss's vector-Jacobian product, as JAX would keep it: every architecture, method and remat policy
says for itself what it keeps, and no formula has to follow them.
"""

import math

import jax
import jax.numpy as jnp

from efficientllm.adapters.base import join
from efficientllm.objectives.next_token import loss_fn
from efficientllm.sharding import local_bytes

FIELDS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "positions": jnp.int32,
    "weights": jnp.float32,
}


def batch_shapes(rows, length, sharding=None):
    """A batch's abstract arrays, `[rows, length]` each."""
    return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in FIELDS.items()}


def predicted_bytes(lm, state, rows, length, ways=1):
    """Bytes of one device at the height of a step of `rows` rows (a micro-batch's) of `length` tokens.

    `state` is the abstract TrainState (with shardings, of one device's shards), unboxed; the rows are dealt out to
    `ways` devices, and what tensor parallelism splits further is not taken off. Gradients are as the parameters.
    """
    return local_bytes((state, state.params)) + math.ceil(activation_bytes(lm, state, rows, length) / ways)


def moved_bytes(lm, state, rows, length, accumulate=1):
    """The bytes that a step moves over all devices, were every array to pass through memory once for each use.

    Each of `accumulate` micro-batches of `rows` rows reads the parameters forward and backward, and writes and reads
    what the forward pass leaves. The optimiser reads the gradients, and reads and writes moments and what learns.
    """
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    learnt, frozen, moments = size(state.params), size(state.frozen), size(state.opt_state)
    passes = 2 * (learnt + frozen) + 2 * activation_bytes(lm, state, rows, length)
    return accumulate * (passes + learnt) + 3 * learnt + 2 * moments


def activation_bytes(lm, state, rows, length):
    """Bytes that the forward pass leaves for the backward pass, and those of the group that is being remade."""
    kept = _kept_bytes(lm, state, rows, length)
    everything = _kept_bytes(lm.clone(remat="everything_saveable"), state, rows, length)
    return kept + max(0, everything - kept) // lm.num_groups


def _kept_bytes(lm, state, rows, length):
    def closure(learnt, frozen, batch):
        given = {id(leaf) for leaf in jax.tree.leaves((learnt, frozen, batch))}

        def loss(learnt):
            return loss_fn(lm, join(learnt, frozen), batch, 1.0)[0]

        backward = jax.vjp(loss, learnt)[1]
        return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]

    kept = jax.eval_shape(closure, state.params, state.frozen, batch_shapes(rows, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
