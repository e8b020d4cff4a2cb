"""Next-token objective: cross-entropy of each token given those before it."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.embeds.tokens import LM, head_kernel
from efficientllm.errors import FieldError
from efficientllm.metrics.reading import Reading, missing
from efficientllm.objectives.base import Losses, Metrics, Objective, exact_sum, with_router_losses
from efficientllm.objectives.cross_entropy import nll_sum
from efficientllm.registry import register
from efficientllm.typing import Batch, Params

_TOKENS = ("tokens", "targets", "segments", "positions", "weights")  # arrays of a batch, one number a token
NO_BYTES = "no held-out target stands for text: they are ends of documents"


@register("objective", "next_token")
@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Next-token prediction in nats per target.

    Bits per byte can be compared between tokenizers; the loss and the perplexity cannot.
    """

    unit = "nat"
    units = {"eval_loss": "nat", "perplexity": "1", "bits_per_byte": "bit"}
    evaluated_on = "held-out text"
    judged_by = "bits_per_byte"  # loss and perplexity depend on the tokenizer
    likelihood_name = "likelihood a byte of held-out text"

    def check(self, model: typing.Any) -> None:
        if model.reads != "text and images":  # such a model reads text alone, too
            super().check(model)

    def axes(self, model: typing.Any) -> dict[str, tuple[str | None, ...]]:
        return dict.fromkeys(_TOKENS, ("length",)) | {name: array.axes for name, array in model.image_arrays(1).items()}

    def row_shapes(self, model: typing.Any, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = {
            name: jax.ShapeDtypeStruct((length,), jnp.float32 if name == "weights" else jnp.int32) for name in _TOKENS
        }
        return arrays | {name: array.row for name, array in model.image_arrays(length).items()}

    def totals(self, batch: Batch, accumulate: int) -> tuple[jax.Array, jax.Array | None]:
        """Returns the mean number of targets of a micro-batch, and of its tokens; None where it is the whole step."""
        targets = jnp.sum(batch["weights"]) / accumulate
        return targets, None if accumulate == 1 else jnp.sum(batch["segments"] > 0) / accumulate

    def loss(
        self, model: LM, params: Params, batch: Batch, key: jax.Array | None, totals: typing.Any
    ) -> tuple[jax.Array, Metrics]:
        """Computes next-token cross-entropy in nats per target, plus the router losses.

        The loss of a micro-batch is weighted so that every target and every token of the step counts alike.
        """
        targets, tokens = totals
        nats, aux = _nats(model, params, batch)
        cross_entropy = nats / jnp.maximum(targets, 1.0)
        if tokens is not None:
            share = jnp.sum(batch["segments"] > 0) / jnp.maximum(tokens, 1.0)
            aux = jax.tree.map(lambda leaf: leaf * share, aux)
        return with_router_losses(cross_entropy, aux)

    def counts(self, model: LM, batch: Batch) -> dict[str, jax.Array]:
        segments_BT = batch["segments"]
        return {"tokens": jnp.sum(segments_BT > 0), "samples": jnp.sum(jnp.max(segments_BT, -1))}

    def held_out_sums(self, model: LM, params: Params, batch: Batch, table: jax.Array) -> tuple:
        """Computes `(sum of nats, number of targets, UTF-8 bytes of the targets)`."""
        nats, _ = _nats(model, params, batch)
        bytes_BT = table[batch["targets"]]
        return nats, jnp.sum(batch["weights"]), jnp.sum(bytes_BT * batch["weights"])

    def held_out(self, sums: list[tuple]) -> Losses:
        """Returns `{"eval_loss", "perplexity", "bits_per_byte"}`.

        `eval_loss` is nats per token. `bits_per_byte` is the same loss over the UTF-8 bytes of the text; it is absent
        where no target is text. The end of a document is predicted too, and counts as a token of no bytes. Values are
        not finite where the model's are not.
        """
        nats, targets, text_bytes = (
            (exact_sum(map(float, column)) for column in zip(*sums, strict=True)) if sums else (0,) * 3
        )
        if not targets:
            raise FieldError(
                "batches", "none of the held-out rows has a token to predict; raise it, or config.train.length"
            )
        loss = nats / targets
        per_byte = {"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {}
        perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss  # e^710 is infinite
        return {"eval_loss": loss, "perplexity": perplexity, **per_byte}

    def held_out_table(self, model: LM, data: typing.Any) -> np.ndarray:
        return token_bytes(data.tokenizer, model)

    def likelihood(self, loss: float) -> float:
        """Returns `2^-bits_per_byte`: 1 is certainty."""
        return 2**-loss

    def readings(self, losses: Losses) -> dict[str, Reading]:
        lacks_bytes = losses and "bits_per_byte" not in losses
        return super().readings(losses) | ({"bits_per_byte": missing("bit", NO_BYTES)} if lacks_bytes else {})


NEXT_TOKEN = NextToken()


def _nats(model, params, batch):
    """Computes `(sum of nats of the targets, aux)`."""
    x_BTD, _, aux = model.apply({"params": params}, batch["tokens"], model.context(batch), readout=False)
    return nll_sum(x_BTD, head_kernel(model, params), batch, model.precision), aux


def token_bytes(tokenizer: typing.Any, lm: LM) -> np.ndarray:
    """Returns the UTF-8 bytes of each token, float32 `[V]`; zero for ids that the model has and the tokenizer not."""
    table: np.ndarray = np.zeros(lm.vocab_size, np.float32)
    table[: tokenizer.vocab_size] = tokenizer.token_bytes
    return table
