"""Mixture-of-experts layer: outputs, metrics and refused specs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ffns import routing
from efficientllm.registry import build

B, T, D, E, F = 2, 12, 16, 8, 24
X = np.random.default_rng(0).standard_normal((B, T, D), np.float32)


def layer(precision="float32", **values):
    fields = {"num_experts": E, "top_k": 2, "hidden": F} | values
    return build(
        "ffn", f"moe({', '.join(f'{key}={value!r}' for key, value in fields.items())})", {"precision": precision}
    )


def parameters(moe, x=X, sharpness=50):
    """Random parameters, with a router that is far from blind."""
    params = nn.unbox(jax.jit(moe.init)(jax.random.key(0), x)["params"])
    return params | {"router": params["router"] | {"kernel": sharpness * params["router"]["kernel"]}}


def run(moe, params, x=X):
    return jax.jit(lambda params, x: moe.apply({"params": params}, x))(params, x)


def swiglu(x, kernels, e):
    gate, up, down = (np.asarray(kernels[name]["kernel"][e]) for name in ("gate", "up", "down"))
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def expected(params, routed, mask=None):
    """The sum over each token's kept experts, one token and one expert at a time."""
    y, weights = np.zeros(X.shape, np.float32), np.asarray(routed.weights_BTk)
    for b, t, choice in np.ndindex(*routed.experts_BTk.shape):
        if mask is None or mask[b, t, choice]:
            expert = int(routed.experts_BTk[b, t, choice])
            y[b, t] += weights[b, t, choice] * swiglu(X[b, t], params["experts"], expert)
    return y


def test_dropless_is_the_sum_over_the_chosen_experts():
    moe = layer()
    params = parameters(moe)
    y, aux = run(moe, params)
    logits = X @ params["router"]["kernel"]
    routed = routing.route(logits, 2, "softmax", True, 1.0)
    np.testing.assert_allclose(y, expected(params, routed), atol=1e-5)
    load = routing.load(routed.experts_BTk, E)
    np.testing.assert_allclose(aux["stats"]["load"], load, rtol=1e-6)
    np.testing.assert_allclose(aux["stats"]["entropy"], routing.entropy(routed.probabilities_BTE), rtol=1e-5)
    assert aux["stats"]["drop_rate"] == 0.0
    np.testing.assert_allclose(aux["losses"]["load_balance"], 0.01 * routing.load_balance_loss(routed, load), rtol=1e-5)
    np.testing.assert_allclose(aux["losses"]["z_loss"], 0.001 * routing.z_loss(logits), rtol=1e-5)


def test_capacity_leaves_dropped_assignments_out():
    moe = layer(dispatch="capacity", capacity_factor=0.7)
    params = parameters(moe)
    y, aux = run(moe, params)
    routed = routing.route(X @ params["router"]["kernel"], 2, "softmax", True, 1.0)
    mask, taken = np.zeros((B, T, 2), bool), np.zeros((B, E), int)
    for b, choice, t in np.ndindex(B, 2, T):
        expert = int(routed.experts_BTk[b, t, choice])
        mask[b, t, choice] = taken[b, expert] < 3  # ceil(12 * 2 / 8 * 0.7)
        taken[b, expert] += 1
    np.testing.assert_allclose(y, expected(params, routed, mask), atol=1e-5)
    np.testing.assert_allclose(aux["stats"]["drop_rate"], 1 - mask.mean(), rtol=1e-6)
    assert 0.05 < aux["stats"]["drop_rate"] < 0.6


def loss_and_gradients(moe, params):
    def loss(params, x):
        y, aux = moe.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)) + sum(aux["losses"].values())

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)


@pytest.mark.slow
def test_capacity_for_all_is_dropless():
    dropless, roomy = layer(), layer(dispatch="capacity", capacity_factor=E / 2)
    params = parameters(dropless)
    pair = loss_and_gradients(dropless, params), loss_and_gradients(roomy, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *pair)


def test_kernels_agree():
    blocked, ragged = layer(kernel="blocked"), layer(kernel="ragged_dot")
    params = parameters(blocked)
    pair = loss_and_gradients(blocked, params), loss_and_gradients(ragged, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *pair)


@pytest.mark.slow
def test_dropless_treats_each_token_alone():
    moe = layer()
    params = parameters(moe)
    whole, _ = run(moe, params)
    for t in (0, 5):
        alone, _ = run(moe, params, X[:1, t : t + 1])
        np.testing.assert_allclose(alone[0, 0], whole[0, t], atol=1e-6)
    order = np.random.default_rng(1).permutation(T)
    np.testing.assert_allclose(run(moe, params, X[:, order])[0], whole[:, order], atol=1e-6)


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_router_is_float32_under_every_policy(precision):
    moe = layer(precision, scores="sigmoid", bias_rate=0.001)
    params = parameters(moe)
    x = jnp.asarray(X, jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    y, aux = run(moe, params, x)
    assert y.dtype == x.dtype and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(aux))
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    np.testing.assert_allclose(aux["losses"]["z_loss"], 0.001 * routing.z_loss(jnp.asarray(logits)), rtol=1e-6)


def test_bias_update_moves_towards_the_mean_load():
    moe = layer(num_experts=4, bias_rate=0.5)
    params = {"router": {"kernel": np.ones((D, 4)), "bias": np.zeros(4)}, "experts": {}}
    loads = np.array([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]], np.float32)
    updated = moe.after_step(params, {"load": loads[0]})
    np.testing.assert_array_equal(updated["router"]["bias"], [-0.5, -0.5, 0.5, 0.5])
    assert updated["router"]["kernel"] is params["router"]["kernel"]
    stacked = {"router": {"bias": np.zeros((2, 4))}}
    both = moe.after_step(stacked, {"load": loads})["router"]["bias"]
    np.testing.assert_array_equal(both, [[-0.5, -0.5, 0.5, 0.5], [0, 0, 0, 0]])
    assert layer().after_step(params, {"load": loads[0]}) is params


def test_bias_update_balances_a_skewed_router():
    moe = layer(bias_rate=0.02, scores="sigmoid")
    x = X + 3.0  # a common direction, so that a few experts win everywhere
    params = parameters(moe, x, sharpness=5)
    apply = jax.jit(lambda params: moe.apply({"params": params}, x)[1]["stats"])
    before = stats = apply(params)
    for _ in range(150):
        params = moe.after_step(params, stats)
        stats = apply(params)
    assert before["load"].max() > 2.5 / E
    assert stats["load"].max() < 1.7 / E


@pytest.mark.parametrize("fields", [{}, {"dispatch": "capacity"}])
def test_memory_is_what_the_formula_says(fields):
    moe = layer(hidden=128, load_balance=0.0, **fields)
    x = jax.ShapeDtypeStruct((4, 128, 64), jnp.float32)
    params = jax.eval_shape(lambda x: nn.unbox(moe.init(jax.random.key(0), x)["params"]), x)
    step = jax.jit(jax.grad(lambda p, x: jnp.sum(moe.apply({"params": p}, x)[0] ** 2), (0, 1)))
    temporary = step.lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert 1 / 1.3 < temporary / moe.temporary_bytes(4, 128, 64) < 1.3


def test_active_fraction():
    assert layer().active_fraction == 0.25


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"top_k": 9}, "top_k = 9 must lie between 1 and num_experts = 8"),
        ({"top_k": 0}, "top_k = 0: must be at least 1"),
        ({"scores": "sofmax"}, "scores = 'sofmax' is none of softmax, sigmoid; did you mean 'softmax'"),
        ({"dispatch": "droples"}, "dispatch = 'droples' is none of dropless, capacity; did you mean 'dropless'"),
        ({"kernel": "ragged"}, "kernel = 'ragged' is none of auto, blocked, ragged_dot"),
        ({"hidden": 0}, "hidden = 0: must be at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0: must be above 0"),
        ({"scale": -1.0}, "scale = -1.0: must be above 0"),
        ({"z_loss": -0.1}, "z_loss = -0.1: must be at least 0"),
        ({"shared_hidden": -8}, "shared_hidden = -8: must be at least 0"),
        ({"shared_gate": True}, "shared_gate = True needs a shared expert"),
    ],
)
def test_values_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        layer(**fields)
