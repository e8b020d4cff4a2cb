"""Next-token objective: cross-entropy of each token given those before it."""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import sharding
from efficientllm.embeds.tokens import LM, head_kernel
from efficientllm.errors import FieldError
from efficientllm.metrics.reading import Reading, missing
from efficientllm.objectives.base import Losses, Metrics, Objective, exact_sum, with_router_losses
from efficientllm.objectives.cross_entropy import nll_sum, nll_sum_and_misses
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice
from efficientllm.typing import Batch, Params

_TOKENS = ("tokens", "targets", "segments", "positions", "weights")  # arrays of a batch, one number a token
EXACT = "held-out records, each with all that is learnt of it"
NO_BYTES = "no held-out target stands for text: they are ends of documents"


@flax.struct.dataclass
class TokenBytes:
    """Table of a held-out evaluation: the UTF-8 bytes of each token, float32, and whether documents are records."""

    of_token_V: typing.Any
    has_records: bool = flax.struct.field(pytree_node=False, default=False)


@register("objective", "next_token")
@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Next-token prediction in nats per target.

    Bits per byte can be compared between tokenizers; the loss and the perplexity cannot.
    """

    unit = "nat"
    units = {"eval_loss": "nat", "perplexity": "1", "bits_per_byte": "bit", "exact_match": "1"}
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
        if kernel_choice.platform() == "gpu" and sharding.is_alone():
            # The chunked loss has its gradient ready, that of the whole head: dividing it is one more pass over it.
            cross_entropy, aux = _nats(model, params, batch | {"weights": batch["weights"] / jnp.maximum(targets, 1.0)})
        else:
            nats, aux = _nats(model, params, batch)
            cross_entropy = nats / jnp.maximum(targets, 1.0)
        if tokens is not None:
            share = jnp.sum(batch["segments"] > 0) / jnp.maximum(tokens, 1.0)
            aux = jax.tree.map(lambda leaf: leaf * share, aux)
        return with_router_losses(cross_entropy, aux)

    def counts(self, model: LM, batch: Batch) -> dict[str, jax.Array]:
        segments_BT = batch["segments"]
        return {"tokens": jnp.sum(segments_BT > 0), "samples": jnp.sum(jnp.max(segments_BT, -1))}

    def held_out_sums(self, model: LM, params: Params, batch: Batch, table: TokenBytes) -> tuple:
        """Computes `(sum of nats, number of targets, UTF-8 bytes of the targets)`, and of records also
        `(those whose every target is the likeliest token, those with a target)`."""
        bytes_BT = table.of_token_V[batch["targets"]]
        counts = jnp.sum(batch["weights"]), jnp.sum(bytes_BT * batch["weights"])
        if not table.has_records:
            return _nats(model, params, batch)[0], *counts
        x_BTD, _ = _states(model, params, batch)
        nats, misses_BT = nll_sum_and_misses(x_BTD, head_kernel(model, params), batch, model.precision)
        return nats, *counts, *_count_exact(misses_BT, batch)

    def held_out(self, sums: list[tuple]) -> Losses:
        """Returns `{"eval_loss", "perplexity", "bits_per_byte"}`, and of records `exact_match`.

        `eval_loss` is nats per token. `bits_per_byte` is the same loss over the UTF-8 bytes of the text; it is absent
        where no target is text. The end of a document is predicted too, and counts as a token of no bytes.
        `exact_match` is the share of records whose every target, given those before it, is the likeliest token: greedy
        decoding would give the same answers. Of a record that is longer than a row, what the row holds counts. Values
        are not finite where the model's are not.
        """
        totals = [exact_sum(map(float, column)) for column in zip(*sums, strict=True)] if sums else [0.0] * 3
        nats, targets, text_bytes, *exact = totals
        if not targets:
            raise FieldError(
                "batches", "none of the held-out rows has a token to predict; raise it, or config.train.length"
            )
        loss = nats / targets
        per_byte = {"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {}
        perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss  # e^710 is infinite
        losses = {"eval_loss": loss, "perplexity": perplexity, **per_byte}
        parts = {"eval_loss": [(float(terms[0]), float(terms[1])) for terms in sums]}
        if exact:
            losses["exact_match"] = exact[0] / exact[1]
            parts["exact_match"] = [(float(terms[3]), float(terms[4])) for terms in sums]
        return Losses(losses, parts)

    def held_out_table(self, model: LM, data: typing.Any) -> TokenBytes:
        return TokenBytes(token_bytes(data.tokenizer, model), data.has_records)

    def likelihood(self, loss: float) -> float:
        """Returns `2^-bits_per_byte`: 1 is certainty."""
        return 2**-loss

    def readings(self, losses: Mapping[str, float]) -> dict[str, Reading]:
        readings = super().readings(losses)
        if losses and "bits_per_byte" not in losses:
            readings["bits_per_byte"] = missing("bit", NO_BYTES)
        if "exact_match" in readings:
            readings["exact_match"] = dataclasses.replace(readings["exact_match"], source=EXACT)
        return readings


NEXT_TOKEN = NextToken()


def _nats(model, params, batch):
    """Computes `(sum of nats of the targets, aux)`."""
    x_BTD, aux = _states(model, params, batch)
    return nll_sum(x_BTD, head_kernel(model, params), batch, model.precision), aux


def _states(model, params, batch):
    """Computes `(states that the head reads, aux)`."""
    x_BTD, _, aux = model.apply({"params": params}, batch["tokens"], model.context(batch), readout=False)
    return x_BTD, aux


def _count_exact(misses_BT, batch):
    """Counts `(records without a miss among their targets, records with a target)`; a segment of a row is a record."""
    is_target_BT = batch["weights"] > 0
    columns = (is_target_BT & misses_BT, is_target_BT)
    T = misses_BT.shape[1]
    sum_segments = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=T + 1))
    misses_BS, targets_BS = (sum_segments(column.astype(jnp.int32), batch["segments"]) for column in columns)
    return jnp.sum((targets_BS > 0) & (misses_BS == 0)), jnp.sum(targets_BS > 0)


def token_bytes(tokenizer: typing.Any, lm: LM) -> np.ndarray:
    """Returns the UTF-8 bytes of each token, float32 `[V]`; zero for ids that the model has and the tokenizer not."""
    table: np.ndarray = np.zeros(lm.vocab_size, np.float32)
    table[: tokenizer.vocab_size] = tokenizer.token_bytes
    return table
