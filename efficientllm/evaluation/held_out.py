"""Evaluation of an objective on held-out data."""

import typing

import jax

from efficientllm.objectives.base import Losses, Objective
from efficientllm.sharding import to_device


def evaluate(
    objective: Objective,
    held_out_sums: typing.Callable,
    params: typing.Any,
    batches: typing.Iterable[dict],
    table: typing.Any,
    shardings: dict[str, jax.sharding.NamedSharding],
    after_batch: typing.Callable[[], typing.Any] | None = None,
) -> Losses:
    """Computes the objective's `Losses` over held-out batches.

    `held_out_sums(params, batch, table)` is the objective's, compiled; `shardings` are those of a batch's arrays.
    `after_batch()` is called after every batch.
    Raises UserError where no row has a loss.
    """
    sums = []
    for batch in batches:
        sums.append(held_out_sums(params, to_device(batch, shardings), table))
        if after_batch:
            jax.block_until_ready(sums[-1])
            after_batch()
    return objective.held_out(jax.device_get(sums))


def line(losses: Losses) -> str:
    """Formats losses as `held out  eval_loss 4.9897  perplexity 146.9`; those of single noise levels are for charts."""
    return "held out  " + "  ".join(f"{key} {value:.4f}" for key, value in losses.items() if "_level_" not in key)
