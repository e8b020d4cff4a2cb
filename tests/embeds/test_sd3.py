"""Stable Diffusion 3 of the published sizes: parameters and products; meshes and rounded weights of a tiny one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sd3
from efficientllm import model, sharding
from efficientllm.architecture import from_config
from efficientllm.cost import formulas, jaxpr_flops
from efficientllm.embeds.condition import Condition
from efficientllm.objectives.flow import Flow
from efficientllm.quant.apply import quantize
from efficientllm.weights import Weight
from tiers import slow_case

# Of diffusers' classes of the published configs, without the fixed table of positions.
PARAMETERS = {"sd3_medium": 2_028_328_000, "sd35_medium": 2_243_171_520, "sd35_large": 8_056_627_520}
DUAL = {"sd3_medium": 0, "sd35_medium": 13, "sd35_large": 0}


def build(variant, **changes):
    config = sd3.get_config(variant).model
    config.attention_kernel = "xla"
    config.update(changes)
    return from_config.from_config(config)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_sizes_have_the_published_parameters(variant):
    denoiser = build(variant)
    assert formulas.count_parameters(denoiser, model.abstract_params(denoiser))["total"] == PARAMETERS[variant]
    assert len(denoiser.stacks) == (3 if DUAL[variant] else 2)


@pytest.mark.parametrize(
    "variant, side, text, teraflops",
    [("sd35_medium", 128, 333, 11.25), ("sd35_medium", 64, 333, 2.44), ("sd35_large", 128, 333, 31.12)],
)
def test_products_are_the_closed_formula_s(variant, side, text, teraflops):
    """The published number is of a last block whose text has queries too, which nothing reads; here it has none."""
    embed = sd3.get_config(variant).model.embed.replace("side=128", f"side={side}")
    denoiser = build(variant, embed=embed)
    boxed = model.abstract_params(denoiser)
    L, D, T, S = denoiser.num_layers, denoiser.dim, denoiser.row_length(0), text
    N = T + S
    blocks = L * (12 * D**2 * T + 6 * D**2) + (L - 1) * (2 * N**2 * D + 12 * D**2 * S + 6 * D**2)
    last = 2 * T * N * D + 2 * D**2 * S + 2 * D**2
    dual = DUAL[variant] * (4 * D**2 * T + 2 * T**2 * D + 3 * D**2)
    ends = 128 * D * T + 4096 * D * S + (256 + 2048) * D + 4 * D**2
    expected = 2 * (blocks + last + dual + ends)
    assert formulas.forward_flops(denoiser, boxed, T) == expected
    jaxpr = jax.make_jaxpr(lambda params: denoiser.apply({"params": params}, *denoiser.example(0)))(nn.unbox(boxed))
    assert jaxpr_flops.count_program_flops(jaxpr) == expected
    unread = 2 * (2 * S * N * D + D**2 * S)
    assert round((expected + unread) / 1e12, 2) == teraflops


def random_parameters(denoiser):
    """Parameters none of which is zero."""
    shapes, noise = nn.unbox(model.abstract_params(denoiser)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * noise.standard_normal(leaf.shape, np.float32), shapes)


def inputs(denoiser, rows=8):
    noise = np.random.default_rng(1)
    text, pooled = (
        noise.standard_normal((rows, *row.shape), np.float32) for row in denoiser.condition_shapes().values()
    )
    images = noise.standard_normal((rows, 8, 8, 4), np.float32)
    return images, jnp.linspace(1, 999, rows), Condition(text_BSE=text, pooled_BE=pooled)


@pytest.mark.slow
def test_a_step_on_eight_devices_is_that_on_one():
    denoiser = build("tiny", attention_kernel="auto")
    params, (images, _, condition) = random_parameters(denoiser), inputs(denoiser)
    batch = {"images": images, "text": condition.text_BSE, "pooled": condition.pooled_BE, "weights": jnp.ones(8)}
    batch["identity"] = jnp.arange(8, dtype=jnp.uint32)
    objective, key = Flow(shift=3.0, label_dropout=0.2), jax.random.key(1)

    def step(params, batch):
        def loss(params):
            return objective.loss(denoiser, params, batch, key, objective.totals(batch, 1))[0]

        return jax.value_and_grad(loss)(params)

    alone = jax.jit(step)(params, batch)
    mesh = sharding.make_mesh("data=2, fsdp=2, tensor=2")
    shards = sharding.abstract_shards(model.abstract_params(denoiser), mesh)
    assert any("tensor" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(shards))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf, shard: jax.device_put(leaf, shard.sharding), params, shards)
        rows = objective.batch_shardings(denoiser, mesh)
        split = jax.jit(step)(placed, {name: jax.device_put(batch[name], rows[name]) for name in rows})
    np.testing.assert_allclose(alone[0], split[0], rtol=1e-5)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max() + 1e-6)

    jax.tree.map(close, alone[1], split[1])


@pytest.mark.slow
@pytest.mark.parametrize("form", [slow_case("int8()"), slow_case("int4()"), "nf4()"])
def test_predictions_of_rounded_weights_are_those_of_their_values(form):
    """Of both streams; modulations and the text's ffn too."""
    denoiser = build("tiny")
    params = random_parameters(denoiser)
    rounded = quantize(params, form)
    values = jax.tree.map(lambda leaf: leaf.dense() if isinstance(leaf, Weight) else leaf, rounded, is_leaf=is_weight)
    text = rounded["groups"]["block_0"]["mixer"]
    assert all(isinstance(text[name]["kernel"], Weight) for name in ("q", "text_q", "text_o", "text_modulation"))
    assert isinstance(text["text_ffn"]["up"]["kernel"], Weight)
    predict = jax.jit(lambda params: denoiser.apply({"params": params}, *inputs(denoiser, 2))[0])
    expected, exact = predict(values), predict(params)
    np.testing.assert_allclose(predict(rounded), expected, atol=1e-3 * np.abs(expected).max())
    assert np.abs(expected - exact).max() > 1e-3 * np.abs(exact).max()


def is_weight(leaf):
    return isinstance(leaf, Weight)
