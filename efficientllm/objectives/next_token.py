"""The next-token objective: its loss in training, its sums over held-out text, and the bytes that tokens stand for."""

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.objectives.cross_entropy import nll_sum
from efficientllm.ops.attention import Context


def loss_fn(lm, params, batch, targets, tokens=None):
    """Next-token cross-entropy in nats a target plus the routers' losses -> `(loss, metrics)`.

    `targets` is the number to divide by: a micro-batch divides by the mean of its step, so that every target of the
    step counts alike; so do its `tokens` that are no padding, in what its ffns hand on (None: the batch is a step).
    `metrics["aux"]` holds each block's statistics, stacked over groups.
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


def eval_step(lm, params, batch, token_bytes_V):
    """`(summed nats, targets, UTF-8 bytes of the targets)` of a batch."""
    ctx = Context.packed(batch["positions"], batch["segments"])
    x_BTD, _, _ = lm.apply({"params": params}, batch["tokens"], ctx, readout=False)
    nats = nll_sum(x_BTD, models.head_kernel(lm, params), batch, lm.precision)
    bytes_BT = token_bytes_V[batch["targets"]]
    return nats, jnp.sum(batch["weights"]), jnp.sum(bytes_BT * batch["weights"])


def bytes_of(tokenizer, lm):
    """UTF-8 bytes of each token, float32 `[V]`, zero where the model has more tokens than the tokenizer."""
    table = np.zeros(lm.vocab_size, np.float32)
    table[: tokenizer.vocab_size] = tokenizer.token_bytes
    return table
