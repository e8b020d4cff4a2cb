"""Text encoders against transformers in float32: hidden vectors, gradients, and files in both directions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import encoder_folders as folders
from convert.encoder_folders import torch, transformers
from efficientllm import convert, model, sharding
from efficientllm.convert import check_text_encoder
from tiers import slow_case, slow_except

pytestmark = pytest.mark.xdist_group("encoders")

END = 95  # the largest id: both ways to find the end token find it
TOLERANCE = 1e-5  # float32 rounding of states of some 3


def loaded(folder):
    source = convert.open_source(folder)
    encoder = source.lm()
    return source, encoder, source.load(nn.unbox(model.abstract_params(encoder)))


def encode(encoder, params, *inputs):
    return jax.jit(encoder.apply)({"params": params}, *inputs)


@pytest.mark.parametrize("name", slow_except(folders.ENCODERS, "clip-quick", "t5", "umt5"))
def test_states_of_transformers_and_files_byte_by_byte(name, tmp_path):
    """Of texts without a mask, whose padding is read, and with one; states of padding are compared too."""
    reference, folder = folders.reference(name), folders.saved(name)
    source, encoder, params = loaded(folder)
    tokens_BT, real_BT = folders.tokens(7 if name == "clip-plain" else END)
    for mask in (None, real_BT):
        expected = check_text_encoder.encode_with(reference, tokens_BT, mask)
        actual = encode(encoder, params, tokens_BT, mask)
        np.testing.assert_allclose(actual.states_BTD, expected.states_BTD, atol=TOLERANCE)
        assert (actual.pooled_BD is None) == (expected.pooled_BD is None) == ("t5" in name)
        if expected.pooled_BD is not None:
            np.testing.assert_allclose(actual.pooled_BD, expected.pooled_BD, atol=TOLERANCE)
    convert.convert(source, tmp_path / "converted")
    convert.export(encoder, params, tmp_path / "exported", source.config["model_type"])  # the config.json too is ours
    for written in ("converted", "exported"):
        theirs = type(reference).from_pretrained(tmp_path / written).eval()
        states = check_text_encoder.encode_with(theirs, tokens_BT, real_BT).states_BTD
        np.testing.assert_array_equal(states, expected.states_BTD)
        if name != "clip-plain":  # ours has the prefix that all versions of transformers read
            file = "model.safetensors"
            assert (tmp_path / written / file).read_bytes() == (folder / file).read_bytes()
        assert convert.open_source(tmp_path / written).model == source.model


@pytest.mark.parametrize("name", ["clip-quick", slow_case("clip-erf")])
def test_states_before_the_last_layer(name):
    """Without the final norm, as diffusers reads them; scanned and unrolled."""
    _, encoder, params = loaded(folders.saved(name))
    tokens_BT, _ = folders.tokens(END)
    with torch.no_grad():
        outputs = folders.reference(name)(torch.tensor(tokens_BT).long(), output_hidden_states=True)
    unrolled = model.unroll(encoder.clone(skip=1), params)
    for form in ((encoder.clone(skip=1), params), unrolled):
        states_BTD, pooled_BD = encode(*form, tokens_BT)
        np.testing.assert_allclose(states_BTD, outputs.hidden_states[-2].numpy(), atol=TOLERANCE)
        np.testing.assert_allclose(pooled_BD, outputs.text_embeds.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["t5", slow_case("umt5")])
def test_gradients(name, tmp_path):
    """Of all parameters, read from a file of theirs as parameters are: that of a shared table is the sum."""
    _, encoder, params = loaded(folders.saved(name))
    tokens_BT, real_BT = folders.tokens(END)
    direction = np.random.default_rng(1).normal(size=(*tokens_BT.shape, encoder.dim)).astype(np.float32)

    def loss(params):
        return jnp.sum(encoder.apply({"params": params}, tokens_BT, real_BT).states_BTD * direction)

    reference = folders.build(name)
    outputs = reference(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(real_BT).long())
    (outputs.last_hidden_state * torch.tensor(direction)).sum().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    reference.save_pretrained(tmp_path)
    _, _, expected = loaded(tmp_path)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))

    def close(actual, expected):
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7 * largest

    jax.tree.map(close, jax.jit(jax.grad(loss))(params), expected)


def test_loading_onto_eight_devices():
    _, encoder, params = loaded(folders.saved("t5"))
    tokens_BT, real_BT = folders.tokens(END)
    mesh = sharding.make_mesh("fsdp=2, data=2, tensor=2")
    with jax.set_mesh(mesh):
        source = convert.open_source(folders.saved("t5"))
        sharded = source.load(sharding.abstract_shards(model.abstract_params(encoder), mesh), lm=encoder)
        states_BTD = encode(encoder, sharded, tokens_BT, real_BT).states_BTD
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    np.testing.assert_allclose(states_BTD, encode(encoder, params, tokens_BT, real_BT).states_BTD, atol=TOLERANCE)


def test_the_check_sees_a_difference(tmp_path):
    """A model whose scores are scaled is another."""
    source, encoder, params = loaded(folders.saved("t5"))
    tokens_BT, _ = folders.tokens(END)
    mixer = encoder.blocks[0][0].replace("score_scale=1.0", "score_scale=0.0")
    other = encoder.clone(blocks=((mixer, encoder.blocks[0][1]),))
    difference = encode(other, params, tokens_BT).states_BTD - encode(encoder, params, tokens_BT).states_BTD
    assert np.abs(difference).max() > 1e-2
    assert transformers.T5EncoderModel is type(check_text_encoder.load_reference(source))
