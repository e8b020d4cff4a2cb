"""Embeddings of noise levels and classes: shapes, names and initial values of their parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.embeds import conditioning

pytestmark = pytest.mark.quick
LEVELS = jnp.array([0.0, 1.0, 37.5, 999.0])


class Labels(nn.Module):
    @nn.compact
    def __call__(self, labels_B):
        return conditioning.embed_labels(self, labels_B, classes=1000, dim=64)


@pytest.mark.parametrize("denominator", [128, 127])
def test_waves_are_cosines_then_sines(denominator):
    angle = np.asarray(LEVELS, np.float64)[:, None] * 10_000 ** (-np.arange(128) / denominator)
    waves = conditioning.level_waves(LEVELS, denominator)
    # An exponent x is rounded three times, its power and the angle once: 999 e^-x (3 x + 1) 6e-8 is 9.2e-5 at most,
    # half a digit of an angle of 999 is 3.1e-5.
    np.testing.assert_allclose(waves, np.concatenate([np.cos(angle), np.sin(angle)], -1), rtol=0, atol=1.3e-4)


def test_parameters_of_a_time_embedding():
    module = conditioning.TimeEmbedding(96, "float32")
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), LEVELS)["params"])
    shapes = {"0": {"kernel": (256, 96), "bias": (96,)}, "2": {"kernel": (96, 96), "bias": (96,)}}
    assert jax.tree.map(jnp.shape, params) == shapes
    for layer in params.values():
        assert abs(float(jnp.std(layer["kernel"])) - 0.02) < 4 * 0.02 / (2 * layer["kernel"].size) ** 0.5
        assert not jnp.any(layer["bias"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_time_embedding_is_float32(precision):
    module = conditioning.TimeEmbedding(96, precision)
    exact = conditioning.TimeEmbedding(96, "float32")
    params = module.init(jax.random.key(0), LEVELS)
    vectors = module.apply(params, LEVELS)
    assert vectors.dtype == jnp.float32 and vectors.shape == (4, 96)
    error = jnp.linalg.norm(vectors - exact.apply(params, LEVELS)) / jnp.linalg.norm(vectors)
    assert (error == 0) == (precision == "float32") and error < 0.02


def test_labels_have_a_row_more_than_classes():
    params = nn.unbox(Labels().init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"])
    assert jax.tree.map(jnp.shape, params) == {"label_table": (1001, 64)}
    assert abs(float(jnp.std(params["label_table"])) - 0.02) < 4 * 0.02 / (2 * 1001 * 64) ** 0.5
    labels_B = jnp.array([3, 1000, 0])
    np.testing.assert_array_equal(Labels().apply({"params": params}, labels_B), params["label_table"][labels_B])
