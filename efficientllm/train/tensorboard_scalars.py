"""TensorBoard scalars of a training step: losses, and each router's load, entropy and drop rate."""

import typing
from collections.abc import Sequence

import numpy as np


def scalars(metrics: dict[str, typing.Any], layer_numbers: Sequence[range]) -> dict[str, float]:
    """Formats a step's metrics, already on the host, as `{tag: number}`.

    Router statistics are tagged by layer: `z_router/entropy/layer_03`, `z_router/drop_rate/layer_03`, and
    `z_router/load/layer_03/expert_1`, the share of the routed tokens that the expert gets (balanced: 1/E). The `z_`
    sorts them below all other charts. `layer_numbers` are those of each block (`Stacks.layer_numbers`).
    """
    numbers = {key: float(metrics[key]) for key in ("loss", "total_loss", "learning_rate", "grad_norm")}
    for block, aux in enumerate(metrics["aux"]):
        for name, values in aux.get("stats", {}).items():
            for number, value in zip(layer_numbers[block], np.asarray(values), strict=True):
                layer = f"z_router/{name}/layer_{number:02}"
                if value.ndim == 0:
                    numbers[layer] = float(value)
                else:
                    numbers |= {f"{layer}/expert_{expert}": float(share) for expert, share in enumerate(value)}
        for name, values in aux.get("losses", {}).items():
            numbers[f"z_router/{name}/block_{block}"] = float(np.mean(values))
    return numbers
