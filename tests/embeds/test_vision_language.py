"""Vision-language models on meshes, rematerialized, quantized, and with text alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import vision_folders as folders
from convert.test_vision_parity import loaded, prompts
from efficientllm import convert, model, sharding
from efficientllm.architecture import from_config
from efficientllm.ops.attention import Context
from efficientllm.quant.apply import quantize
from efficientllm.vision.token_rows import Prompt, make_batch
from efficientllm.weights import Weight

pytestmark = pytest.mark.xdist_group("vision")
GRIDS = [(1, 10, 14), (1, 8, 4), (1, 6, 4)]


def logits(lm, params, made):
    tokens_BT, ctx = jax.tree.map(jnp.asarray, (made.tokens_BT, made.ctx))
    real_BT1 = np.asarray(made.ctx.mask.segments_BT)[..., None] > 0
    return np.where(real_BT1, jax.jit(lm.apply)({"params": params}, tokens_BT, ctx)[0], 0)


@pytest.mark.slow
def test_loading_onto_eight_devices():
    """Rows with their images, features and heads are sharded; numbers are those of one device."""
    _, lm, params = loaded("qwen2.5")
    made = make_batch(lm, prompts("qwen2.5", GRIDS) * 2)
    mesh = sharding.make_mesh("fsdp=2, data=2, tensor=2")
    with jax.set_mesh(mesh):
        source = convert.open_source(folders.saved("qwen2.5"))
        sharded = source.load(sharding.abstract_shards(model.abstract_params(lm), mesh), lm=lm)
        actual = logits(lm, sharded, made)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded["vision"]))
    np.testing.assert_allclose(actual, logits(lm, params, made), atol=1e-5)


@pytest.mark.slow
def test_every_parameter_of_the_tower_has_a_gradient_and_rematerialization_changes_none():
    _, lm, params = loaded("internvl")
    made = make_batch(lm, prompts("internvl", GRIDS))
    full = convert.open_source(folders.saved("internvl"), weights=False).lm(remat="full")

    def gradient(lm):
        def loss(params):
            return jnp.sum(lm.apply({"params": params}, jnp.asarray(made.tokens_BT), made.ctx, readout=False)[0] ** 2)

        return jax.jit(jax.grad(loss))(params)

    plain = gradient(lm)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["vision"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), plain, gradient(full))


def test_quantized_towers():
    """Every product of the tower goes through `weights.matmul`: int8 is near, and its kernels are stored as int8."""
    _, lm, params = loaded("llava")
    made = make_batch(lm, prompts("llava", [(1, 4, 4)] * 3))
    rounded = quantize(params, "int8()")
    is_weight = {"is_leaf": lambda leaf: isinstance(leaf, Weight)}
    kernels = [leaf for leaf in jax.tree.leaves(rounded["vision"], **is_weight) if isinstance(leaf, Weight)]
    assert len(kernels) == 9  # the patches, six of a layer, two of the projector
    actual, expected = logits(lm, rounded, made), logits(lm, params, made)
    assert 0 < np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


def test_text_alone_is_the_language_model():
    """Bit for bit: without images the tower is not computed."""
    _, lm, params = loaded("qwen2.5")
    tokens_BT = jnp.asarray([[3, 4, 5, 6]])
    positions_BT = jnp.arange(4)[None]
    text = convert.open_source(folders.saved("qwen2.5"), weights=False).model | {"embed": "tokens"}
    of_text = from_config.from_config(from_config.complete_model(text))
    own = {key: value for key, value in params.items() if key != "vision"}
    expected = of_text.apply({"params": own}, tokens_BT, Context.packed(positions_BT))[0]
    actual = lm.apply({"params": params}, tokens_BT, Context.packed(positions_BT))[0]
    np.testing.assert_array_equal(actual, expected)
    made = make_batch(lm, [Prompt([3, 4, 5, 6])])
    np.testing.assert_allclose(logits(lm, params, made), expected, atol=1e-6)


def test_parameters_are_made_with_axes():
    """As many logical axes as dimensions, of all parameters, the tower's too."""
    _, lm, params = loaded("internvl")
    boxed = model.abstract_params(lm)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)
