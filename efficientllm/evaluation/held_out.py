"""Held-out loss, perplexity and bits per byte.

Bits per byte can be compared between tokenizers; the other two cannot.
"""

import math
import typing

import jax
import numpy as np

from efficientllm.errors import UserError
from efficientllm.metrics.reading import Reading, finite_or_missing, missing
from efficientllm.sharding import to_device

UNITS = {"eval_loss": "nat", "perplexity": "1", "bits_per_byte": "bit"}
NO_BYTES = "no held-out target stands for text: they are ends of documents"
Losses = dict[str, float]


def evaluate(
    eval_step: typing.Callable,
    params: typing.Any,
    batches: typing.Iterable[dict],
    token_bytes_V: np.ndarray,
    mesh: jax.sharding.Mesh,
    after_batch: typing.Callable[[], typing.Any] | None = None,
) -> Losses:
    """Computes `{"eval_loss", "perplexity", "bits_per_byte"}` over held-out batches.

    `eval_loss` is nats per token. `bits_per_byte` is the same loss over the UTF-8 bytes of the text; it is absent where
    no target is text. The end of a document is predicted too, and counts as a token of no bytes. Values are not finite
    where the model's are not. `after_batch()` is called after every batch. Raises UserError where no token has a loss.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, to_device(batch, mesh), token_bytes_V))
        if after_batch:
            jax.block_until_ready(sums[-1])
            after_batch()
    columns = zip(*sums, strict=True) if sums else ((), (), ())
    nats, targets, text_bytes = (_sum(map(float, column)) for column in columns)  # in double precision, on the host
    if not targets:
        raise UserError("none of the held-out rows has a token to predict; raise config.eval.batches or train.length")
    loss = nats / targets
    per_byte = {"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {}
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss  # e^710 is infinite in double precision
    return {"eval_loss": loss, "perplexity": perplexity, **per_byte}


def _sum(values):
    """The exact sum. Infinities and NaN are added as floats, because `fsum` raises for them."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def readings(losses: Losses) -> dict[str, Reading]:
    """Converts the losses of `evaluate` to Readings. A loss that is absent or not finite is null, with the reason."""
    converted = {key: finite_or_missing(value, UNITS[key], "held-out text") for key, value in losses.items()}
    return converted | ({"bits_per_byte": missing("bit", NO_BYTES)} if losses and "bits_per_byte" not in losses else {})


def line(losses: Losses) -> str:
    """Formats losses as `held out  eval_loss 4.9897  perplexity 146.9`."""
    return "held out  " + "  ".join(f"{key} {value:.4f}" for key, value in losses.items())
