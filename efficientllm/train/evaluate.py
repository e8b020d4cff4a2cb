"""Held-out loss, in units that compare tokenizers too."""

import math

import jax

from efficientllm.errors import UserError
from efficientllm.train.loop import to_device


def evaluate(compiled, params, batches, token_bytes_V, mesh, each=None):
    """Loss over held-out batches -> `{"eval_loss", "perplexity", "bits_per_byte"}`, the last only of tokens of text.

    `eval_loss` is nats a token, `bits_per_byte` the same nats over the UTF-8 bytes of the text. A document's end is
    predicted, and counts as a token of no bytes. Sums are taken in double precision on the host. `each()` is
    called after every batch. Raises UserError where no token has a loss.
    """
    parts = []
    for batch in batches:
        parts.append(compiled(params, to_device(batch, mesh), token_bytes_V))
        if each:
            jax.block_until_ready(parts[-1])
            each()
    nats, targets, text_bytes = (math.fsum(float(part) for part in column) for column in zip(*parts, strict=True))
    if not targets:
        raise UserError("none of the held-out rows has a token to predict; raise config.eval.batches or train.length")
    loss = nats / targets
    of_bytes = {"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {}
    perplexity = math.exp(min(loss, 700.0))  # beyond is infinite in double precision
    return {"eval_loss": loss, "perplexity": perplexity, **of_bytes}
