"""Diffusion transformers of the paper's sizes: parameters and products; the order of tokens; an untrained model."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dit, dit_study
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.cost import formulas, jaxpr_flops
from efficientllm.embeds.condition import Condition
from efficientllm.embeds.picture import ImageFormat
from efficientllm.errors import UserError
from tiers import slow_except

# Parameters as published (arXiv:2212.09748, Table 1 and the code's position table left out).
PARAMETERS = {
    "dit_s2": 32_865_056,
    "dit_b2": 130_315_808,
    "dit_b4": 130_426_496,
    "dit_l2": 457_840_672,
    "dit_l8": 458_578_432,
    "dit_xl2": 674_834_720,
}


def build(size="dit_s2", variant="mha", **changes):
    config = dit_study.get_config(variant).model
    config.size = size
    config.update(changes)
    return from_config.from_config(config)


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_have_the_published_parameters(size):
    dit_model = build(size)
    assert formulas.count_parameters(dit_model, model.abstract_params(dit_model))["total"] == PARAMETERS[size]


@pytest.mark.parametrize("variant, total", [("mqa", 605_101_280), ("gqa", 619_047_968)])
def test_the_study_s_attentions_have_its_parameters(variant, total):
    dit_model = build("dit_xl2", variant)
    assert formulas.count_parameters(dit_model, model.abstract_params(dit_model))["total"] == total


@pytest.mark.parametrize("size", slow_except([*PARAMETERS], "dit_s2", "dit_b4"))
def test_products_are_the_closed_formula_s(size):
    """The paper's "Gflops" count multiply-adds; here a multiply-add is two."""
    dit_model = build(size)
    boxed = model.abstract_params(dit_model)
    L, D, T, p, C = dit_model.num_layers, dit_model.dim, dit_model.row_length(0), dit_model.patch, 4
    blocks = L * (12 * D**2 * T + 2 * T**2 * D + 6 * D**2)
    expected = 2 * (blocks + 3 * p**2 * C * D * T + 256 * D + 3 * D**2)
    jaxpr = jax.make_jaxpr(lambda params: dit_model.apply({"params": params}, *dit_model.example(0)))(nn.unbox(boxed))
    assert jaxpr_flops.count_program_flops(jaxpr) == expected
    assert formulas.forward_flops(dit_model, boxed, T) == expected


def small(side=16, **embed):
    config = dit.get_config().model
    config.size = "dit_tiny4(num_layers=1, dim=16, num_heads=2, num_kv_heads=2, head_dim=8, hidden=32)"
    fields = ", ".join(f"{key}={value}" for key, value in embed.items())
    config.embed = f"patches({fields})"
    return from_config.from_config(config, ImageFormat(side, 3, 5))


def random_parameters(dit_model):
    """Parameters none of which is zero."""
    shapes, noise = nn.unbox(model.abstract_params(dit_model)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * noise.standard_normal(leaf.shape, np.float32), shapes)


def inputs():
    noise = np.random.default_rng(1)
    return noise.standard_normal((2, 16, 16, 3), np.float32), jnp.array([3.0, 700.0]), Condition(jnp.array([1, 5]))


def test_the_order_of_tokens_changes_no_output():
    raster, tiled = small(), small(tile=2)
    params = random_parameters(raster)
    pair = (jax.jit(dit_model.apply)({"params": params}, *inputs())[0] for dit_model in (raster, tiled))
    np.testing.assert_allclose(*pair, atol=2e-5)


def test_an_untrained_model_predicts_nothing():
    dit_model = small()
    params = nn.unbox(model.init_params(dit_model, jax.random.key(0), 0))
    assert not np.any(jax.jit(dit_model.apply)({"params": params}, *inputs())[0])


def test_level_and_label_reach_their_own_picture_alone():
    dit_model = small()
    params, (images, levels, condition) = random_parameters(dit_model), inputs()
    run = jax.jit(lambda *inputs: dit_model.apply({"params": params}, *inputs)[0])
    before = run(images, levels, condition)
    other = Condition(condition.labels_B.at[1].set(0))
    for after in (run(images, levels.at[1].set(5.0), condition), run(images, levels, other)):
        np.testing.assert_array_equal(before[0], after[0])
        assert np.abs(before[1] - after[1]).max() > 1e-3


def test_a_wider_output_has_channels_of_the_variance():
    dit_model = small(learned_sigma=True)
    assert jax.eval_shape(dit_model.apply, {"params": random_parameters(dit_model)}, *inputs())[0].shape[-1] == 6


def test_pictures_that_are_not_square():
    """A model of them has the parameters of any, and is applied to pictures of other sizes."""
    wide, square = small((8, 24)), small()
    params = random_parameters(wide)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_parameters(square))
    assert (wide.size, wide.row_length(0), square.side) == ((8, 24), 12, 16)
    images = np.random.default_rng(1).standard_normal((2, 8, 24, 3), np.float32)
    predictions = [
        jax.jit(dit_model.apply)({"params": params}, images, *inputs()[1:])[0] for dit_model in (wide, square)
    ]
    np.testing.assert_array_equal(*predictions)
    assert predictions[0].shape == images.shape
    with pytest.raises(UserError, match=r"size = \(8, 24\): the pictures of this model must be square"):
        wide.side  # noqa: B018


@pytest.mark.parametrize(
    "fields, message",
    [
        ("size=(16, 16), side=8", "side = 8, size = (16, 16): give one of them"),
        ("size=(16,)", "size = (16,): must be (height, width)"),
        ("size=(16, 18)", "pictures of 16 x 18 are no multiple of 4"),
        ("size=(8, 24)", "side = (8, 24): the pictures of config.data have 16"),
    ],
)
def test_sizes_that_are_refused(fields, message):
    config = dit.get_config().model
    config.embed = f"patches(patch=4, {fields})"
    with pytest.raises(UserError, match=re.escape(message)):
        from_config.from_config(config, None if "18" in fields else ImageFormat(16, 3, 5))


def test_positions_that_count_tokens_are_checked_by_their_number():
    """16 x 16 tokens: rows and columns would fit a table of 64, the 256 of a row do not."""
    counted = build("dit_s2", position="rope(table=64)")
    with pytest.raises(UserError, match="table = 64: a token is at 255; give it at least 256"):
        model.abstract_params(counted)
