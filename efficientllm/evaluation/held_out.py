"""Held-out loss, in units that compare tokenizers too."""

import math

import jax

from efficientllm.errors import UserError
from efficientllm.metrics.reading import finite_or_missing, missing
from efficientllm.sharding import to_device

UNITS = {"eval_loss": "nat", "perplexity": "1", "bits_per_byte": "bit"}
NO_BYTES = "no held-out target stands for text: they are ends of documents"


def evaluate(compiled, params, batches, token_bytes_V, mesh, each=None):
    """Loss over held-out batches -> `{"eval_loss", "perplexity", "bits_per_byte"}`, the last only of tokens of text.

    `eval_loss` is nats a token, `bits_per_byte` the same nats over the UTF-8 bytes of the text. A document's end is
    predicted, and counts as a token of no bytes. Values are not finite where the model's are not. Sums are taken in
    double precision on the host. `each()` is called after every batch. Raises UserError where no token has a loss.
    """
    parts = []
    for batch in batches:
        parts.append(compiled(params, to_device(batch, mesh), token_bytes_V))
        if each:
            jax.block_until_ready(parts[-1])
            each()
    columns = zip(*parts, strict=True) if parts else ((), (), ())
    nats, targets, text_bytes = (_sum(map(float, column)) for column in columns)
    if not targets:
        raise UserError("none of the held-out rows has a token to predict; raise config.eval.batches or train.length")
    loss = nats / targets
    of_bytes = {"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {}
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss  # e^710 is infinite in double precision
    return {"eval_loss": loss, "perplexity": perplexity, **of_bytes}


def _sum(values):
    """The exact sum; of infinities and NaN what plain addition makes of them, where `fsum` raises."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def readings(found):
    """What `evaluate` found as Readings: null, with the reason, for what is not finite or was not found."""
    made = {key: finite_or_missing(value, UNITS[key], "held-out text") for key, value in found.items()}
    return made | ({"bits_per_byte": missing("bit", NO_BYTES)} if found and "bits_per_byte" not in found else {})


def line(found):
    """`held out  eval_loss 4.9897  perplexity 146.9`."""
    return "held out  " + "  ".join(f"{key} {value:.4f}" for key, value in found.items())
