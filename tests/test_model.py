"""The language model: scanned and unrolled layers, patterns of blocks, untied embeddings."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm import model, registry
from efficientllm.cost import formulas, jaxpr_flops
from efficientllm.errors import UserError
from efficientllm.model import blocks
from efficientllm.ops.attention import Context, Mask


@pytest.mark.slow
def test_layers_compiled_one_after_another_are_the_same_function():
    lm, unrolled = (contract.build("mixer", "gqa", unroll=most) for most in (0, 12))

    def run(lm):
        return jax.jit(lambda p: contract.loss_and_gradients(lm, p))

    loop, text = run(lm)(contract.parameters(lm)), run(lm).lower(contract.parameters(lm)).as_text()
    apart, apart_text = run(unrolled)(contract.parameters(lm)), run(unrolled).lower(contract.parameters(lm)).as_text()
    assert "while" in text and "while" not in apart_text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), loop, apart)


def test_untied_embeddings_and_a_hybrid_pattern():
    lm = contract.build("mixer", "gqa", tied=False, pattern=("mha", "mqa | gelu"))
    tokens = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(lambda: lm.init(jax.random.key(0), tokens, Context.packed(tokens)))["params"]
    params = nn.unbox(boxed)
    assert params["head"]["kernel"].shape == (32, contract.VOCAB)
    assert params["groups"]["block_1"]["ffn"].keys() == {"up", "down"}
    with pytest.raises(UserError, match="layers do not divide the 2 layers"):
        contract.build("mixer", "gqa", pattern=("mha", "mqa", "gqa"))


def test_a_pass_in_an_order_that_a_layer_does_not_honour_is_refused():
    """A mask of a batch may have another order than the model."""
    tokens_BT = jnp.zeros((1, 8), jnp.int32)
    prefix = Context.packed(tokens_BT).replace(mask=Mask(order="prefix", blocks_BT=tokens_BT))
    lm = contract.build("mixer", registry.example_spec("mixer", "nsa"))
    with pytest.raises(UserError, match="nsa: reads tokens in causal or bidirectional order, and .* in prefix order"):
        jax.eval_shape(lm.init, jax.random.key(0), tokens_BT, prefix)


def logits(lm, params, tokens):
    return jax.jit(lambda params: lm.apply({"params": params}, tokens, Context.packed(jnp.arange(6)[None]))[0])(params)


@pytest.mark.slow
def test_stacks_of_blocks_are_the_blocks_one_after_another():
    """Two stacks of one block are the stack of both; layers by their number are those of unrolled groups."""
    tokens = jnp.arange(6)[None]
    size = {"size": contract.SIZE.replace("num_layers=2", "num_layers=3")}
    one = contract.build("mixer", "gqa", **size)
    two = contract.build("mixer", "gqa", pattern=("2 * gqa", "1 * gqa"), **size)
    whole = contract.parameters(one)
    first, last = (jax.tree.map(lambda leaf: leaf[rows], whole["groups"]) for rows in (slice(0, 2), slice(2, 3)))  # noqa: B023
    params = whole | {"groups": first, "groups_1": {"block_1": last["block_0"]}}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, contract.parameters(two))
    np.testing.assert_array_equal(logits(one, whole, tokens), logits(two, params, tokens))
    apart, unrolled = model.unroll(two, params)
    assert "block_1" in unrolled["group_2"] and two.stacks.layer_numbers == (range(0, 2), range(2, 3))
    np.testing.assert_allclose(logits(apart, unrolled, tokens), logits(two, params, tokens), rtol=1e-5, atol=1e-6)
    path = "groups_1/block_1/mixer/q/kernel"
    assert two.stacks.unrolled_paths(path) == ["group_2/block_1/mixer/q/kernel"]
    assert two.stacks.stacked_path("group_2/block_1/mixer/q/kernel") == (path, (0,))
    assert two.shallow().num_groups == 2


@pytest.mark.slow
def test_parallel_mixers_add_to_what_both_read():
    """`x + mha(norm(x)) + mqa(norm(x))`, by the modules alone; the ffn reads the sum."""
    lm = contract.build("mixer", "gqa", pattern=("mha + mqa",))
    params = jax.tree.map(lambda leaf: leaf[0], contract.parameters(lm)["groups"]["block_0"])
    assert {"mixer", "mixer_1", "ffn"} < params.keys()
    x_BTD, ctx = jax.random.normal(jax.random.key(0), (2, 6, 32)), Context.packed(jnp.arange(6)[None].repeat(2, 0))
    (first, second), ffn = model.parts(lm)[0]
    mixer, ffn_spec = lm.blocks[0]
    block = blocks.Block(mixer, ffn_spec, lm.norm, "sequential")
    actual = jax.jit(lambda params: block.apply({"params": params}, x_BTD, ctx, None)[0])(params)

    def norm(name, x_BTD):
        return registry.build("norm", lm.norm).apply({"params": params[name]}, x_BTD)

    normed_BTD = norm("mixer_norm", x_BTD)
    sums_BTD = x_BTD + first.apply({"params": params["mixer"]}, normed_BTD, ctx)[0]
    sums_BTD += second.apply({"params": params["mixer_1"]}, normed_BTD, ctx)[0]
    expected = sums_BTD + ffn.apply({"params": params["ffn"]}, norm("ffn_norm", sums_BTD))[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_stacks_and_parallel_mixers_decode_what_they_compute_at_once():
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, contract.VOCAB)
    lm = contract.build("mixer", "gqa", pattern=("1 * mqa", "1 * gqa + mamba(inner=16)"))
    lm, params = model.unroll(lm, contract.parameters(lm))
    whole = lm.apply({"params": params}, tokens, Context.packed(jnp.arange(6)[None].repeat(2, 0)))[0]
    states, steps, one = model.init_states(lm, 2, 6), [], lambda t: jnp.take_along_axis(tokens, t, 1)
    step = jax.jit(lambda states, t: lm.apply({"params": params}, one(t), Context.decoding(t), states)[:2])
    for t in range(6):
        logits_BTV, states = step(states, jnp.full((2, 1), t))
        steps.append(logits_BTV)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, rtol=1e-4, atol=1e-5)
    axes = model.state_axes(lm, states)
    assert axes[1][0][0][0]["k"] == ("batch", None, "kv_heads", None) and "ssm" not in str(axes[0])


def test_flops_of_stacks_and_parallel_mixers_are_their_program_s():
    lm = contract.build("mixer", "gqa", pattern=("1 * mqa", "1 * gqa + mha"), attention_kernel="xla")
    params = contract.parameters(lm)
    tokens = jnp.zeros((1, 6), jnp.int32)
    ctx = Context.packed(jnp.arange(6)[None])
    traced = jax.make_jaxpr(lambda params: lm.apply({"params": params}, tokens, ctx)[0])(params)
    assert formulas.forward_flops(lm, params, 6, executed=True) == jaxpr_flops.count_program_flops(traced)


@pytest.mark.parametrize(
    "pattern, message",
    [
        (("2 * gqa", "mqa"), "entry 1 has no count, and others have one"),
        (("2 * gqa", "1 * mqa"), "counts 2 + 1 make 3 layers; the size has 2"),
        (("gqa + nothing",), "no mixer of that name"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(UserError, match=re.escape(message)):
        contract.build("mixer", "gqa", pattern=pattern)
