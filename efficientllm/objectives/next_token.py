"""Next-token objective: the training loss, held-out loss sums, and UTF-8 bytes per token."""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.objectives.cross_entropy import nll_sum
from efficientllm.ops.attention import Context
from efficientllm.typing import Batch, Params


def loss_fn(
    lm: models.LM,
    params: Params,
    batch: Batch,
    targets: float | jax.Array,
    tokens: float | jax.Array | None = None,
) -> tuple[jax.Array, dict[str, typing.Any]]:
    """Computes `(loss, metrics)`: next-token cross-entropy in nats per target, plus the router losses.

    The loss of a micro-batch is weighted so that every target and every token of the step counts alike.

    Args:
      targets: what the summed nats are divided by: the mean number of targets of the step's micro-batches.
      tokens: the mean number of tokens without padding, by which the ffns' statistics are weighted. None where the
        batch is the whole step.

    `metrics["aux"]` holds the statistics of each block, stacked over groups.
    """
    ctx = Context.packed(batch["positions"], batch["segments"])
    x_BTD, _, aux = lm.apply({"params": params}, batch["tokens"], ctx, readout=False)
    nats = nll_sum(x_BTD, models.head_kernel(lm, params), batch, lm.precision)
    cross_entropy = nats / jnp.maximum(targets, 1.0)
    if tokens is not None:
        share = jnp.sum(batch["segments"] > 0) / jnp.maximum(tokens, 1.0)
        aux = jax.tree.map(lambda leaf: leaf * share, aux)
    router = sum(jnp.mean(leaf) for block in aux for leaf in block.get("losses", {}).values())
    total = cross_entropy + router
    return total, {"loss": cross_entropy, "total_loss": total, "aux": aux}


def eval_step(
    lm: models.LM, params: Params, batch: Batch, token_bytes_V: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `(sum of nats, number of targets, UTF-8 bytes of the targets)` of a held-out batch."""
    ctx = Context.packed(batch["positions"], batch["segments"])
    x_BTD, _, _ = lm.apply({"params": params}, batch["tokens"], ctx, readout=False)
    nats = nll_sum(x_BTD, models.head_kernel(lm, params), batch, lm.precision)
    bytes_BT = token_bytes_V[batch["targets"]]
    return nats, jnp.sum(batch["weights"]), jnp.sum(bytes_BT * batch["weights"])


def token_bytes(tokenizer: typing.Any, lm: models.LM) -> np.ndarray:
    """Returns the UTF-8 bytes of each token, float32 `[V]`; zero for ids that the model has and the tokenizer not."""
    table: np.ndarray = np.zeros(lm.vocab_size, np.float32)
    table[: tokenizer.vocab_size] = tokenizer.token_bytes
    return table
