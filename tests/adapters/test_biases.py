"""GLoRA beside biases: the closed formula, around stacked layers and experts, merged or not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.adapters import base
from efficientllm.adapters.full_delta import GLoRA
from efficientllm.layers import Linear
from efficientllm.registry import build
from efficientllm.weights import box

pytestmark = pytest.mark.quick


@functools.cache
def leaf(*stack, biased=True):
    """A GLoRA of random factors around a kernel [*stack, 6, 4]."""
    draw = np.random.default_rng(0)
    names = (*(None,) * len(stack), "embed", "mlp")
    kernel = box(draw.standard_normal((*stack, 6, 4), np.float32), names)
    method = build("adapter", "glora(rank=2)")
    wrapped = nn.unbox((method.wrap_biased if biased else method.wrap)(kernel, names, jax.random.key(0)))
    return jax.tree.map(lambda array: jnp.asarray(draw.standard_normal(array.shape, np.float32)), wrapped)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_bias_is_pefts_formula(stack):
    glora, bias = leaf(*stack), np.random.default_rng(1).standard_normal((*stack, 4), np.float32)
    column = np.einsum("...ir,...ro->...io", glora.c_a, glora.c_b)
    of_kernel = np.einsum("...io,...ix->...o", glora.base, column)
    expected = bias + bias * np.asarray(glora.d) + np.asarray(glora.e) + of_kernel
    np.testing.assert_allclose(glora.adapted_bias(bias), expected, atol=1e-5)


def test_a_layer_without_bias_has_no_factors_for_one():
    glora = leaf(biased=False)
    assert isinstance(glora, GLoRA) and glora.c_a is glora.c_b is glora.d is glora.e is None
    assert len(jax.tree.leaves(glora)) == 5


def test_a_linear_adds_the_adapted_bias_and_so_does_the_merged_one():
    layer = Linear(4, ("embed", "mlp"), "float32", use_bias=True)
    x, bias = (np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate(((5, 6), (4,))))
    params = {"kernel": leaf(), "bias": bias}
    expected = x @ np.asarray(leaf().dense()) + np.asarray(leaf().adapted_bias(bias))
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)
    merged = base.merge({"layer": params})["layer"]
    np.testing.assert_allclose(layer.apply({"params": merged}, x), expected, atol=1e-5)
    assert isinstance(merged["kernel"], jax.Array)


@pytest.mark.slow
def test_experts_have_biases_of_their_own():
    moe = build("ffn", "moe(num_experts=4, top_k=2, hidden=8, use_bias=True)", {"precision": "float32"})
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 3, 6), np.float32)
    boxed = {"block_0": {"ffn": moe.init(jax.random.key(0), x)["params"]}}
    params = nn.unbox(base.attach(build("adapter", "glora(rank=2)"), boxed, boxed, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * draw.standard_normal(leaf.shape, np.float32), params)
    experts = params["block_0"]["ffn"]["experts"]
    assert experts["down"]["kernel"].d.shape == (4, 1)
    assert isinstance(params["block_0"]["ffn"]["router"]["kernel"], jax.Array)

    def run(tree):
        return np.asarray(moe.apply({"params": tree["block_0"]["ffn"]}, x)[0])

    np.testing.assert_allclose(run(params), run(base.merge(params)), atol=1e-5)
    biases = {name: layer["bias"] for name, layer in experts.items()}
    merged = base.merge(params)["block_0"]["ffn"]["experts"]
    assert all(np.abs(merged[name]["bias"] - biases[name]).max() > 0.01 for name in biases)
