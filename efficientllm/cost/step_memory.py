"""Memory estimate of a training step from shapes: no array is made and nothing is compiled.

It sums parameters, optimiser state, gradients of trainable parameters, and residuals. Residuals are the arrays in the
closure of `jax.vjp` of the loss, so they follow every architecture, method and remat policy without a formula.
"""

import math
import typing

import jax
import jax.numpy as jnp

from efficientllm.adapters.base import join
from efficientllm.model import LM
from efficientllm.objectives.next_token import loss_fn
from efficientllm.sharding import local_bytes

FIELDS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "positions": jnp.int32,
    "weights": jnp.float32,
}


def batch_shapes(
    rows: int, length: int, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arrays of a batch, `[rows, length]` each."""
    return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in FIELDS.items()}


def predicted_bytes(lm: LM, state: typing.Any, rows: int, length: int, shards: int = 1) -> int:
    """Peak bytes per device of a step of `rows` rows (of a micro-batch) of `length` tokens.

    state:  the abstract TrainState, unboxed; if it has shardings, one device's shards count.
    shards: devices over which the rows are sharded. Tensor parallelism is not subtracted from the residuals.
    Gradients take the bytes of the parameters.
    """
    return local_bytes((state, state.params)) + math.ceil(activation_bytes(lm, state, rows, length) / shards)


def moved_bytes(lm: LM, state: typing.Any, rows: int, length: int, accumulate: int = 1) -> int:
    """Memory traffic of a step over all devices in bytes, if every use of an array passes through memory once.

    Each of `accumulate` micro-batches of `rows` rows reads the parameters forward and backward, and writes and reads
    the residuals. The optimiser reads the gradients, and reads and writes moments and trainable parameters.
    """
    trainable, frozen, moments = map(_tree_bytes, (state.params, state.frozen, state.opt_state))
    passes = 2 * (trainable + frozen) + 2 * activation_bytes(lm, state, rows, length)
    return accumulate * (passes + trainable) + 3 * trainable + 2 * moments


def activation_bytes(lm: LM, state: typing.Any, rows: int, length: int) -> int:
    """Bytes of the residuals, and of the activations of the one group that is being rematerialized."""
    residuals = _residual_bytes(lm, state, rows, length)
    all_activations = _residual_bytes(lm.clone(remat="everything_saveable"), state, rows, length)
    return residuals + max(0, all_activations - residuals) // lm.num_groups


def _residual_bytes(lm, state, rows, length):
    def closure(trainable, frozen, batch):
        inputs = {id(leaf) for leaf in jax.tree.leaves((trainable, frozen, batch))}

        def loss(trainable):
            return loss_fn(lm, join(trainable, frozen), batch, 1.0)[0]

        backward = jax.vjp(loss, trainable)[1]
        return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in inputs]

    residuals = jax.eval_shape(closure, state.params, state.frozen, batch_shapes(rows, length))
    return _tree_bytes(residuals)


def _tree_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
