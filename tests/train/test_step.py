"""A training step."""

import jax
import numpy as np

import contract
from efficientllm.train import step


def test_accumulation_changes_nothing_even_where_targets_are_missing():
    lm, batch = contract.build("mixer", "gqa"), contract.batch()
    batch["weights"] = (np.random.default_rng(0).random(batch["weights"].shape) < 0.5).astype(np.float32)
    run = jax.jit(lambda p, n: step.gradients(lm, p, batch, n), static_argnums=1)
    (grads, metrics), (split_grads, split_metrics) = (run(contract.parameters(lm), n) for n in (1, 4))
    np.testing.assert_allclose(metrics["loss"], split_metrics["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, split_grads)
