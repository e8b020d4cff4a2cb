"""TensorBoard scalars of a training step."""

import numpy as np
import pytest

from efficientllm.train import tensorboard_scalars

pytestmark = pytest.mark.quick


def test_charts_name_layers_across_groups():
    stats = {"load": np.array([[0.25, 0.75], [0.5, 0.5]]), "entropy": np.array([0.1, 0.2])}
    metrics = dict.fromkeys(("loss", "total_loss", "learning_rate", "grad_norm"), 1.0)
    metrics["aux"] = ({}, {"stats": stats, "losses": {"z_loss": np.array([1.0, 3.0])}})
    shown = tensorboard_scalars.scalars(metrics, (range(0, 4, 2), range(1, 4, 2)))
    assert shown["z_router/load/layer_01/expert_1"] == 0.75 and shown["z_router/entropy/layer_03"] == 0.2
    assert shown["z_router/z_loss/block_1"] == 2.0 and "z_router/load/layer_00/expert_0" not in shown
