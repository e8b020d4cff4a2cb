"""Memory estimate of a training step from shapes: no array is made and nothing is compiled.

It sums parameters, optimiser state, gradients of trainable parameters, and residuals. Residuals are the arrays in the
closure of `jax.vjp` of the loss, so they follow every architecture, method and remat policy without a formula.
"""

import math
import typing

import jax

from efficientllm.adapters.base import join
from efficientllm.model import Backbone
from efficientllm.objectives.base import Objective
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.sharding import local_bytes


def predicted_bytes(
    lm: Backbone,
    state: typing.Any,
    rows: int,
    length: int,
    shards: int = 1,
    objective: Objective = NEXT_TOKEN,
    activations: int | None = None,
) -> int:
    """Peak bytes per device of a step of `rows` rows (of a micro-batch) of `length` tokens.

    state:  the abstract TrainState, unboxed; if it has shardings, one device's shards count.
    shards: devices over which the rows are sharded. Tensor parallelism is not subtracted from the residuals.
    activations: `activation_bytes` of these rows, where they are known: tracing them takes half a second.
    Gradients take the bytes of the parameters.
    """
    return sum(predicted_parts(lm, state, rows, length, shards, objective, activations).values())


def predicted_parts(
    lm: Backbone,
    state: typing.Any,
    rows: int,
    length: int,
    shards: int = 1,
    objective: Objective = NEXT_TOKEN,
    activations: int | None = None,
) -> dict[str, int]:
    """The terms of `predicted_bytes`: weights, optimiser state (and average of the parameters), gradients of trainable
    parameters, and activations, which are the residuals."""
    weights = local_bytes((state.params, state.frozen))
    if activations is None:
        activations = activation_bytes(lm, state, rows, length, objective)
    return {
        "weights": weights,
        "optimizer": local_bytes(state) - weights,
        "gradients": local_bytes(state.params),
        "activations": math.ceil(activations / shards),
    }


def moved_bytes(state: typing.Any, activations: int, accumulate: int = 1) -> int:
    """Memory traffic of a step over all devices in bytes, if every use of an array passes through memory once.

    Each of `accumulate` micro-batches, whose rows have the bytes `activations` (`activation_bytes`), reads the
    parameters forward and backward, and writes and reads the residuals. The optimiser reads the gradients, and reads
    and writes moments and trainable parameters.
    """
    trainable, frozen, moments = map(_tree_bytes, (state.params, state.frozen, state.opt_state))
    passes = 2 * (trainable + frozen) + 2 * activations
    return accumulate * (passes + trainable) + 3 * trainable + 2 * moments


def activation_bytes(lm: Backbone, state: typing.Any, rows: int, length: int, objective: Objective = NEXT_TOKEN) -> int:
    """Bytes of the residuals, and of the activations of the one group that is being rematerialized."""
    residuals = _residual_bytes(lm, state, rows, length, objective)
    all_activations = _residual_bytes(lm.clone(remat="everything_saveable"), state, rows, length, objective)
    return residuals + max(0, all_activations - residuals) // lm.num_groups


def _residual_bytes(lm, state, rows, length, objective):
    def closure(trainable, frozen, batch, key):
        inputs = {id(leaf) for leaf in jax.tree.leaves((trainable, frozen, batch))}

        def loss(trainable):
            return objective.loss(lm, join(trainable, frozen), batch, key, objective.totals(batch, 1))[0]

        backward = jax.vjp(loss, trainable)[1]
        return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in inputs]

    # Abstract: no array can be made while a mesh of devices that are not attached is in scope.
    key = jax.eval_shape(lambda: jax.random.key(0))
    residuals = jax.eval_shape(closure, state.params, state.frozen, objective.batch_shapes(lm, rows, length), key)
    return _tree_bytes(residuals)


def _tree_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
