"""Joint attention: a text's tokens and patches read each other; counts of the last layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.registry import build

pytestmark = pytest.mark.quick
SPEC = "joint(num_heads=2, head_dim=4, hidden=12, text_length=3, precision='float32', attention_kernel='auto', {})"


def joint(fields):
    return build("mixer", SPEC.format(f"norm='rmsnorm(eps=1e-06)', {fields}"), parent=None)


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x_BTD, text_BSD, condition_BD = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 5, 8), (2, 3, 8), (2, 8)), strict=True)
    )
    ctx = Context.whole(jnp.arange(5)[None]).replace(condition_BD=condition_BD, memo={"text": text_BSD})
    return x_BTD, ctx


def parameters(mixer):
    x_BTD, ctx = inputs()
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x_BTD, ctx))["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), shapes)


def test_every_patch_and_every_token_of_a_text_reads_all_of_both():
    mixer = joint("qk_norm='head'")
    params, (x_BTD, ctx) = parameters(mixer), inputs()

    def outputs(x_BTD, text_BSD):
        y_BTD, _, memo = mixer.apply({"params": params}, x_BTD, ctx.replace(memo={"text": text_BSD}))
        return jnp.concatenate([y_BTD, memo["text"]], 1)

    streams = x_BTD, ctx.memo["text"]
    for which in (0, 1):
        slopes = jax.jit(jax.jacrev(outputs, which))(*streams)  # [B, N, D, B, tokens, D]
        reads = np.abs(slopes).max((2, 5)) > 1e-6
        assert reads[0, :, 0].all() and reads[1, :, 1].all()
        assert not reads[0, :, 1].any() and not reads[1, :, 0].any()


def test_the_last_layer_ends_the_text():
    mixer = joint("last=True")
    params, (x_BTD, ctx) = parameters(mixer), inputs()
    assert {"text_o", "text_ffn", "text_q_norm"}.isdisjoint(params) and params["text_modulation"]["bias"].shape == (16,)
    y_BTD, state = mixer.apply({"params": params}, x_BTD, ctx)
    assert y_BTD.shape == x_BTD.shape and state is None
    changed = ctx.replace(memo={"text": ctx.memo["text"].at[:, 1].multiply(jnp.arange(8) - 3)})
    assert np.abs(y_BTD - mixer.apply({"params": params}, x_BTD, changed)[0]).max() > 1e-3


def test_what_joint_attention_refuses():
    with pytest.raises(UserError, match="joint: qk_norm = 'all'"):
        joint("qk_norm='all'")
    x_BTD, ctx = inputs()
    with pytest.raises(UserError, match="joint: needs a conditioning vector"):
        jax.eval_shape(joint("").init, jax.random.key(0), x_BTD, ctx.replace(condition_BD=None))
