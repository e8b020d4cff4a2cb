"""Choice, weights, losses and statistics of the router, against the formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ffns import routing

B, T, E, K = 2, 9, 6, 3
LOGITS = np.random.default_rng(0).standard_normal((B, T, E), np.float32)


def scores_of(kind):
    return {"softmax": lambda: np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)}.get(
        kind, lambda: 1 / (1 + np.exp(-LOGITS))
    )()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
def test_best_experts_and_their_weights(scores, normalise):
    routed = routing.route(LOGITS, K, scores, normalise, 2.5)
    order = np.argsort(-LOGITS, -1)[..., :K]
    weights = np.take_along_axis(scores_of(scores), order, -1)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_array_equal(routed.experts_BTk, order)
    np.testing.assert_allclose(routed.weights_BTk, 2.5 * weights, rtol=1e-6)
    np.testing.assert_allclose(routed.probabilities_BTE.sum(-1), np.ones((B, T)), rtol=1e-6)


def test_bias_chooses_and_does_not_weigh():
    bias = np.array([0, 0, 0, 0, 0, 9.0], np.float32)
    routed = routing.route(LOGITS, K, "sigmoid", False, 1.0, bias)
    assert (routed.experts_BTk[..., 0] == 5).all()
    np.testing.assert_allclose(routed.weights_BTk[..., 0], scores_of("sigmoid")[..., 5], rtol=1e-6)

    def total(logits, bias):
        return jnp.sum(routing.route(logits, K, "sigmoid", True, 1.0, bias).weights_BTk ** 2)

    d_logits, d_bias = jax.grad(total, (0, 1))(LOGITS, bias)
    assert jnp.abs(d_logits).max() > 0 and not d_bias.any()


def test_load_balance_loss_by_hand():
    routed = routing.route(LOGITS, K, "softmax", True, 1.0)
    load = routing.load(routed.experts_BTk, E)
    counts = np.bincount(np.argsort(-LOGITS, -1)[..., :K].ravel(), minlength=E)
    np.testing.assert_allclose(load, counts / (B * T * K), rtol=1e-6)
    expected = E * np.sum(counts / (B * T) * scores_of("softmax").mean((0, 1)))
    np.testing.assert_allclose(routing.load_balance_loss(routed, load), expected, rtol=1e-6)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balanced_router_has_loss_k(scores):
    logits = 5.0 * jnp.stack([jnp.roll(jnp.arange(E, dtype=jnp.float32), shift) for shift in range(E)])[None]
    routed = routing.route(logits, K, scores, True, 1.0)
    load = routing.load(routed.experts_BTk, E)
    np.testing.assert_allclose(load, np.full(E, 1 / E), rtol=1e-6)
    np.testing.assert_allclose(routing.load_balance_loss(routed, load), K, rtol=1e-6)


def test_z_loss_by_hand():
    expected = np.mean(np.log(np.exp(LOGITS.astype(np.float64)).sum(-1)) ** 2)
    np.testing.assert_allclose(routing.z_loss(LOGITS), expected, rtol=1e-6)


def test_entropy_is_zero_when_sure_and_log_e_when_blind():
    sure, blind = jnp.eye(E)[None], jnp.full((1, 4, E), 1 / E)
    np.testing.assert_allclose(routing.entropy(sure), 0.0, atol=1e-7)
    np.testing.assert_allclose(routing.entropy(blind), np.log(E), rtol=1e-6)
