"""Text encoders: tables of distances that layers share, padding, the vector of a text, quantized weights, bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.architecture.text_encoders import clip, t5
from efficientllm.errors import UserError
from efficientllm.quant.apply import quantize
from efficientllm.weights import resident_bytes

pytestmark = pytest.mark.quick

SIZE = "custom(num_layers=3, dim=32, num_heads=2, num_kv_heads=2, head_dim=16, hidden=64, rope_base=1e4, vocab_size=50)"
RUN = {"precision": "float32", "attention_kernel": "auto", "kv_cache": "activation", "remat": "none"}
RUN |= {"scan": True, "unroll": 12, "size": SIZE}
TOKENS_BT = np.random.default_rng(0).integers(3, 49, (2, 12), np.int32)


def build(recipe, **changes):
    """An encoder and parameters of which none is zero or one."""
    encoder = from_config.from_config(ConfigDict(RUN | recipe | changes))
    params = nn.unbox(model.init_params(encoder, jax.random.key(0), 12))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    jittered = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return encoder, jax.tree.unflatten(structure, jittered)


def encode(encoder, params, *inputs):
    return jax.jit(encoder.apply)({"params": params}, *inputs)


@pytest.mark.slow
def test_a_shared_table_is_that_of_every_layer():
    shared, params = build(t5("geglu", shared=True))
    apart = from_config.from_config(ConfigDict(RUN | t5("geglu", shared=False)))
    table_Hc = params["position"]["table"]
    block = params["groups"]["block_0"]
    of_layers = {"table": jnp.broadcast_to(table_Hc, (3, *table_Hc.shape))}
    block = block | {"mixer": block["mixer"] | {"position": of_layers}}
    params_apart = {key: value for key, value in params.items() if key != "position"} | {"groups": {"block_0": block}}
    expected = encode(apart, params_apart, TOKENS_BT).states_BTD
    for form in ((shared, params), model.unroll(shared, params)):
        np.testing.assert_allclose(encode(*form, TOKENS_BT).states_BTD, expected, atol=1e-6)


def test_padding_is_not_read():
    """A text has the states that it has alone."""
    encoder, params = build(t5("geglu", shared=False))
    real_BT = np.arange(12) < np.array([[12], [5]])
    padded = encode(encoder, params, TOKENS_BT, real_BT).states_BTD
    # Products of other numbers of rows are summed in other blocks.
    np.testing.assert_allclose(padded[1:, :5], encode(encoder, params, TOKENS_BT[1:, :5]).states_BTD, atol=5e-6)
    read = encode(encoder, params, TOKENS_BT).states_BTD
    assert np.abs(read - padded)[1, :5].max() > 1e-3 and np.array_equal(read[0], padded[0])


@pytest.mark.slow
def test_a_causal_text_does_not_read_what_follows():
    encoder, params = build(clip("gelu(kind='quick')", 12))
    changed = np.where(np.arange(12) < 6, TOKENS_BT, 1)
    states, after = (encode(encoder, params, tokens).states_BTD for tokens in (TOKENS_BT, changed))
    np.testing.assert_allclose(states[:, :6], after[:, :6], atol=2e-6)


@pytest.mark.slow
def test_the_vector_of_a_text_is_that_of_its_first_end():
    encoder, params = build(clip("gelu", 12, end_id=2))
    tokens_BT = np.where(np.isin(np.arange(12), (4, 9)), 2, TOKENS_BT)
    states_BTD, pooled_BD = encode(encoder, params, tokens_BT)
    np.testing.assert_array_equal(pooled_BD, states_BTD[:, 4])
    projected, _ = build(clip("gelu", 12, end_id=2, projection=8))
    kernel = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    product_BD = encode(projected, params | {"projection": {"kernel": kernel}}, tokens_BT).pooled_BD
    np.testing.assert_allclose(product_BD, pooled_BD @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_quantized_weights():
    """Forms lose in the order of their bits, and take the bytes of theirs."""
    encoder, params = build(clip("gelu", 12, projection=8))
    expected = encode(encoder, params, TOKENS_BT).states_BTD
    errors, sizes = {}, {}
    for spec in ("int8()", "nf4()", "int4(group=32)"):
        packed = quantize(params, spec)
        states_BTD = encode(encoder, packed, TOKENS_BT).states_BTD
        errors[spec] = float(jnp.linalg.norm(states_BTD - expected) / jnp.linalg.norm(expected))
        sizes[spec] = resident_bytes(packed)
    assert 0 < errors["int8()"] < 0.02 < errors["nf4()"] < errors["int4(group=32)"] < 0.3
    assert sizes["int4(group=32)"] < sizes["int8()"] < resident_bytes(params) / 2


@pytest.mark.parametrize(
    "recipe, message",
    [
        (t5("geglu", True) | {"embed": "text_encoder(projection=4)"}, "embed: projection = 4 projects the vector"),
        (t5("geglu", True) | {"embed": "text_encoder(skip=2)"}, "config.model.embed = .* skip = 2: must be"),
        (t5("geglu", True) | {"mixer": "mha(position='t5(shared=True)')", "position": "none"}, "that layers share"),
    ],
)
def test_what_is_refused(recipe, message):
    with pytest.raises(UserError, match=message):
        from_config.from_config(ConfigDict(RUN | recipe))


def test_a_text_longer_than_the_positions():
    encoder = from_config.from_config(ConfigDict(RUN | clip("gelu", 8)))
    with pytest.raises(UserError, match="a text: 12 tokens, but the position .* has 8 positions"):
        model.init_params(encoder, jax.random.key(0), 12)
