"""What a training step shows in TensorBoard: its scalars, and each router's load, entropy and drop rate."""

import numpy as np


def scalars(metrics, blocks_per_group):
    """`{tag: number}` of a step's metrics on the host.

    Statistics of ffns come a layer at a time, under a name that sorts behind all others: `z_router/entropy/layer_03`,
    `z_router/drop_rate/layer_03`, and `z_router/load/layer_03/expert_1`, the expert's share of what is routed
    (balanced: 1/E).
    """
    shown = {key: float(metrics[key]) for key in ("loss", "total_loss", "learning_rate", "grad_norm")}
    for block, aux in enumerate(metrics["aux"]):
        for name, values in aux.get("stats", {}).items():
            for group, value in enumerate(np.asarray(values)):
                layer = f"z_router/{name}/layer_{group * blocks_per_group + block:02}"
                if value.ndim == 0:
                    shown[layer] = float(value)
                else:
                    shown |= {f"{layer}/expert_{expert}": float(share) for expert, share in enumerate(value)}
        for name, values in aux.get("losses", {}).items():
            shown[f"z_router/{name}/block_{block}"] = float(np.mean(values))
    return shown
