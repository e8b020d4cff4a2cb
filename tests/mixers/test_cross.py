"""Cross-attention against a loop over tokens, and what it says where there is no text."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm import model
from efficientllm.cost.jaxpr_flops import count_matmul_flops
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.registry import build
from tiers import slow_case

B, T, S, D, E, H, G, K = 3, 10, 7, 12, 20, 4, 2, 6
SHAPE = {"num_heads": H, "num_kv_heads": G, "head_dim": K, "norm": "rmsnorm(eps=1e-6)", "precision": "float32"}
TEXT = np.array([[1] * 7, [1] * 4 + [0] * 3, [1, 2, 2, 2, 2, 0, 0]])
IMAGES = np.array([[1] * 10] * 2 + [[1] * 3 + [2] * 7])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def context(text_BSE, image_segments=None, text_segments=None):
    positions = np.arange(T)[None]
    return Context.whole(positions, image_segments).replace(text_BSD=text_BSE, text_segments_BS=text_segments)


def mixer_and_params(**fields):
    mixer = build("mixer", f"cross(text_length={S})", SHAPE | {"attention_kernel": "auto"} | fields)
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), normal(B, T, D), context(normal(B, S, E))))
    return mixer, jax.tree.map(lambda leaf: normal(*leaf.shape) / leaf.shape[0] ** 0.5, shapes["params"])


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def by_loops(p, x_BTD, text_BSE, qk_norm):
    """Each image token over the text tokens of its row and segment."""
    inputs = {"q": x_BTD, "k": text_BSE, "v": text_BSE}
    q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name, x in inputs.items())
    if qk_norm == "all":
        q, k = rms(q, p["q_norm"]["scale"]), rms(k, p["k_norm"]["scale"])
    q, k, v = (y.reshape(*y.shape[:2], -1, K) for y in (q, k, v))
    if qk_norm == "head":
        q, k = rms(q, p["q_norm"]["scale"]), rms(k, p["k_norm"]["scale"])
    y = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        read = TEXT[b] == IMAGES[b, t]
        scores = k[b, read, h * G // H] @ q[b, t, h] * K**-0.5
        weights = np.exp(scores - scores.max())
        y[b, t, h] = weights / weights.sum() @ v[b, read, h * G // H]
    return y.reshape(B, T, -1) @ p["o"]["kernel"] + p["o"]["bias"]


@pytest.mark.parametrize("qk_norm", ["all", slow_case(""), slow_case("head")])
@pytest.mark.parametrize("kernel", ["auto", slow_case("chunked"), slow_case("splash"), slow_case("gathered")])
def test_a_token_reads_the_text_of_its_segment(qk_norm, kernel):
    fields = {"qk_norm": qk_norm, "qkv_bias": True, "o_bias": True, "attention_kernel": kernel}
    mixer, params = mixer_and_params(**fields)
    x, text = normal(B, T, D, seed=1), normal(B, S, E, seed=2)
    y, state = jax.jit(mixer.apply)({"params": params}, x, context(text, IMAGES, TEXT))
    np.testing.assert_allclose(y, by_loops(jax.tree.map(np.float64, params), x, text, qk_norm), atol=1e-5)
    assert state is None and mixer.init_state(B, T) == {} and mixer.state_bytes(T) == 0


def test_a_text_acts_on_its_own_row_and_padding_on_none():
    mixer, params = mixer_and_params()
    x, text = normal(B, T, D, seed=1), normal(B, S, E, seed=2)
    run = jax.jit(lambda text: mixer.apply({"params": params}, x, context(text, None, np.minimum(TEXT, 1)))[0])
    before, after = run(text), run(text + (np.arange(B) == 1)[:, None, None] * (TEXT > 0)[..., None])
    moved = np.abs(after - before).max((1, 2))
    assert moved[1] > 1e-3 and not moved[[0, 2]].any()
    np.testing.assert_array_equal(run(text + 5 * (TEXT == 0)[..., None]), before)


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_flops(kernel):
    mixer, params = mixer_and_params(attention_kernel=kernel)
    ctx = context(normal(B, S, E))
    counted = count_matmul_flops(functools.partial(mixer.apply, x_BTD=normal(B, T, D), ctx=ctx), {"params": params})
    rows = {name: mixer.kernel_rows(f"mixer/{name}/kernel", T) for name in params}
    assert rows == {"q": T, "k": S, "v": S, "o": T}
    kernels = sum(2 * rows[name] * leaf["kernel"].size for name, leaf in params.items())
    assert counted / B == kernels + mixer.mix_flops(T, True) == kernels + mixer.mix_flops(T)


def test_gradients_reach_the_text():
    mixer, params = mixer_and_params(qk_norm="head")

    def loss(params, text):
        return jnp.sum(mixer.apply({"params": params}, normal(B, T, D), context(text, IMAGES, TEXT))[0] ** 2)

    grads, of_text = jax.jit(jax.grad(loss, (0, 1)))(params, normal(B, S, E))
    assert all(jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves((grads, of_text)))
    assert not np.asarray(of_text)[TEXT == 0].any() and np.asarray(of_text)[TEXT > 0].all()


def test_a_model_without_a_text_is_refused():
    lm = contract.build("mixer", "cross(text_length=12)")
    with pytest.raises(UserError, match="reads a text, which the ends of this model do not give it"):
        model.abstract_params(lm)
    mixer, params = mixer_and_params()
    with pytest.raises(UserError, match="text_length = 7, and texts have 9 tokens"):
        mixer.apply({"params": params}, normal(B, T, D), context(normal(B, 9, E)))


@pytest.mark.parametrize("mixer", ["mha(", "cross(text_length=3, "])
def test_norms_of_queries_and_keys_have_three_kinds(mixer):
    with pytest.raises(UserError, match=r"(mha|cross): qk_norm = 'both' is none of '', 'head', 'all'"):
        contract.build("mixer", f"{mixer}qk_norm='both')")
    with pytest.raises(UserError, match="qk_norm = 3: must be bool or str"):
        contract.build("mixer", f"{mixer}qk_norm=3)")


def test_a_norm_of_every_head_or_of_all():
    """True is the spelling of old configs."""
    for kind, width in {"True": 8, "'head'": 8, "'all'": 32}.items():
        lm = contract.build("mixer", f"mha(qk_norm={kind})")
        scale = nn.unbox(model.abstract_params(lm))["groups"]["block_0"]["mixer"]["q_norm"]["scale"]
        assert scale.shape == (2, width)
    for specs in (("mha(qk_norm=True)", "mha(qk_norm='head')"), ("mha", "mha(qk_norm=False)")):
        spelt = [model.parts(contract.build("mixer", spec))[0].mixers[0] for spec in specs]
        assert spelt[0] == spelt[1] and spelt[0].hyperparameters() == spelt[1].hyperparameters()
