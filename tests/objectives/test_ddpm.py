"""The hybrid loss of diffusion against float64 formulas of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fake_denoisers as fake
from efficientllm.errors import UserError
from efficientllm.objectives.ddpm import DDPM
from efficientllm.registry import build

pytestmark = pytest.mark.quick
STEPS = 1000


def tables(steps=STEPS, first=1e-4, last=0.02):
    """`(betas, alpha-bars, alpha-bars of the step before)` by a loop over the definition."""
    betas = [first + (last - first) * t / (steps - 1) for t in range(steps)]
    alpha_bars = [1.0]
    for beta in betas:
        alpha_bars.append(alpha_bars[-1] * (1 - beta))
    return np.array(betas), np.array(alpha_bars[1:]), np.array(alpha_bars[:-1])


def naive_bound(x0, noise, noise_hat, v, t):
    """The bound's term of one picture in bits, in float64, by equations 5-12 of Ho et al. and 13-15 of Nichol."""
    betas, alpha_bars, previous = tables()
    posterior = betas * (1 - previous) / (1 - alpha_bars)
    log_posterior = np.log(np.append(posterior[1], posterior[1:]))[t]
    x_t = np.sqrt(alpha_bars[t]) * x0 + np.sqrt(1 - alpha_bars[t]) * noise
    x0_hat = (x_t - np.sqrt(1 - alpha_bars[t]) * noise_hat) / np.sqrt(alpha_bars[t])

    def mean(picture):
        first = np.sqrt(previous[t]) * betas[t] / (1 - alpha_bars[t])
        return first * picture + np.sqrt(1 - betas[t]) * (1 - previous[t]) / (1 - alpha_bars[t]) * x_t

    fraction = (v + 1) / 2
    log_variance = fraction * np.log(betas[t]) + (1 - fraction) * log_posterior
    if t == 0:
        return -bins(x0, mean(x0_hat), np.exp(0.5 * log_variance)).mean() / np.log(2)
    variance = np.exp(log_variance)
    terms = np.log(variance) - log_posterior + (np.exp(log_posterior) + (mean(x0) - mean(x0_hat)) ** 2) / variance - 1
    return 0.5 * terms.mean() / np.log(2)


def bins(x, mean, scale):
    """Log probabilities of bins of width 2/255, the first and the last without an outer end."""

    def cdf(value):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (value + 0.044715 * value**3)))

    upper, lower = cdf((x - mean + 1 / 255) / scale), cdf((x - mean - 1 / 255) / scale)
    upper, lower = np.where(x > 0.999, 1, upper), np.where(x < -0.999, 0, lower)
    return np.log(np.maximum(upper - lower, 1e-12))


def pictures(rows, seed=0, error=0.3):
    """`(x0, noise, its prediction, v)`, float64; some values lie on the edges and outside."""
    rng = np.random.default_rng(seed)
    x0, noise, wrong = (rng.standard_normal((rows, 4, 4, 3)) for _ in range(3))
    x0 = np.where(np.abs(x0) > 1.5, np.sign(x0), 0.6 * x0)
    return x0, noise, noise + error * wrong, rng.uniform(-1.2, 1.2, x0.shape)


@pytest.mark.parametrize("t", (0, 1, 2, 37, 500, 999))
def test_the_bound_is_that_of_the_papers(t):
    x0, noise, noise_hat, v = pictures(3, seed=t, error=0.01 if t == 0 else 0.3)
    terms = jax.jit(DDPM().held_out_losses)(
        jnp.float32(np.concatenate([noise_hat, v], -1)), jnp.float32(x0), jnp.float32(noise), jnp.full(3, t)
    )
    expected = [naive_bound(*arrays, t) for arrays in zip(x0, noise, noise_hat, v, strict=True)]
    np.testing.assert_allclose(terms["eval_vlb"], expected, rtol=2e-5)
    np.testing.assert_allclose(terms["eval_loss"], ((noise_hat - noise) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_values_of_the_edges_are_in_the_outer_bins():
    """A mean far outside gives a value at the edge probability one, and one inside the least there is."""
    x0 = jnp.array([1.0, -1.0, 0.0]).reshape(3, 1, 1, 1)
    errors = jnp.array([-1.0, 1.0, 1.0]).reshape(3, 1, 1, 1)  # the means are 1.01, -1.01 and 0.01 + 1 - 1
    bits = jax.jit(DDPM().bound)(errors, -jnp.ones((3, 1, 1, 1)), x0, jnp.zeros(3, jnp.int32))
    assert bits[0] == bits[1] < 1.5
    assert bits[2] > bits[0]


def test_the_loss_and_its_gradient_are_those_of_the_formula():
    """Gradients of the parameters against the sum of both terms, of which the bound has the noise stopped."""
    objective, params, batch = DDPM(label_dropout=0.5), fake.kernel(outputs=6), fake.batch()
    batch["weights"] = jnp.array([1.0, 1.0, 0.0, 1.0])
    key, total = jax.random.key(5), jnp.float32(3)
    model = fake.Recorded(fake.wave, learned_sigma=True)
    (loss, metrics), gradient = jax.jit(
        jax.value_and_grad(lambda params: objective.loss(model, params, batch, key, total), has_aux=True)
    )(params)
    seen = metrics["aux"][0]["inputs"]
    x_t, t, labels = (np.asarray(array) for array in seen)
    assert set(labels.ravel()) - set(np.asarray(batch["labels"])) == {10}  # some labels were dropped
    t = t.ravel().astype(int)
    _, alpha_bars, _ = tables()
    signal, share = (np.sqrt(values[t]).reshape(-1, 1, 1, 1) for values in (alpha_bars, 1 - alpha_bars))
    noise = jnp.float32((x_t - signal * np.asarray(batch["images"])) / share)

    def formula(params):
        out = fake.wave(*seen, params)
        noise_hat, v = out[..., :3], out[..., 3:]
        bounds = [jnp_bound(*row) for row in zip(noise, jax.lax.stop_gradient(noise_hat), v, t, strict=True)]
        return (batch["weights"] * (((noise_hat - noise) ** 2).mean((1, 2, 3)) + jnp.array(bounds))).sum() / 3

    expected, expected_gradient = jax.jit(jax.value_and_grad(formula))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient["kernel"], expected_gradient["kernel"], rtol=1e-3, atol=1e-5)
    assert metrics["loss"] == metrics["total_loss"] == loss


def jnp_bound(noise, noise_hat, v, t):
    """The divergence of t > 0 as a function of jax, for its gradient."""
    betas, alpha_bars, previous = tables()
    assert t > 0
    log_posterior = np.log(betas[t] * (1 - previous[t]) / (1 - alpha_bars[t]))
    log_variance = (v + 1) / 2 * np.log(betas[t]) + (1 - v) / 2 * log_posterior
    shift = betas[t] / np.sqrt((1 - betas[t]) * (1 - alpha_bars[t])) * (noise_hat - noise)
    terms = log_variance - log_posterior + (np.exp(log_posterior) + shift**2) / jnp.exp(log_variance) - 1
    return 0.5 * terms.mean() / np.log(2)


def test_only_the_variance_learns_from_the_bound():
    objective = DDPM()
    x0, noise, noise_hat, v = (jnp.float32(array) for array in pictures(2))

    def loss(noise_hat, v, t):
        return objective.training_losses(jnp.concatenate([noise_hat, v], -1), x0, noise, jnp.array([t, 0])).sum()

    to_noise, to_v = jax.jit(jax.grad(loss, (0, 1)))(noise_hat, v, 300)
    np.testing.assert_allclose(to_noise, 2 * (noise_hat - noise) / 48, rtol=1e-5, atol=1e-8)
    assert np.abs(to_v[0]).min() > 0 and np.isfinite(to_v).all()


def test_conversions_undo_each_other_and_the_noise():
    objective, (x0, noise, *_), t = DDPM(), pictures(4), jnp.array([0, 10, 500, 999])
    x_t = objective.add_noise(jnp.float32(x0), jnp.float32(noise), t)
    _, alpha_bars, _ = tables()
    expected = (
        np.sqrt(alpha_bars[t]).reshape(-1, 1, 1, 1) * x0 + np.sqrt(1 - alpha_bars[t]).reshape(-1, 1, 1, 1) * noise
    )
    np.testing.assert_allclose(x_t, expected, rtol=1e-5, atol=1e-6)
    # A picture is e^-5 of x_t at the last step: float32 of x_t leaves 1e-7 / 0.0064 of it.
    np.testing.assert_allclose(objective.to_image(x_t, jnp.float32(noise), t), x0, atol=1e-4)
    np.testing.assert_allclose(objective.to_noise(x_t, jnp.float32(x0), t), noise, atol=2e-5)


def test_levels_are_indices_of_steps_drawn_alike():
    objective = DDPM(steps=10)
    times = np.asarray(objective.draw_times(jax.random.key(0), 10_000))
    assert np.bincount(times, minlength=10).min() > 850 and times.max() == 9
    assert DDPM().held_out_times().tolist() == [125, 250, 375, 500, 625, 750, 875]
    assert DDPM().levels(jnp.array([999])).tolist() == [999.0]


def test_the_simple_loss_needs_no_variance():
    model = fake.Fixed(fake.wave)
    with pytest.raises(UserError, match=r"vlb = True: needs channels of the variance; set vlb=False, or"):
        DDPM().check(model)
    DDPM(vlb=False).check(model)
    params, batch = fake.kernel(), fake.batch()
    model = fake.Recorded(fake.wave)
    loss, metrics = jax.jit(lambda params: DDPM(vlb=False).loss(model, params, batch, jax.random.key(0), 4.0))(params)
    x_t, t, _ = metrics["aux"][0]["inputs"]
    noise = DDPM().to_noise(x_t, batch["images"], t.ravel().astype(int))
    np.testing.assert_allclose(loss, jnp.square(metrics["aux"][0]["output"] - noise).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ddpm(beta=(0.1,))", "needs two variances"),
        ("ddpm(beta=(0.0, 0.02))", "each above 0 and below 1"),
        ("ddpm(steps=1)", "at least 2"),
        ("ddpm(label_dropout=1.5)", "label_dropout = 1.5"),
        ("ddpm(beta=0.1)", "must be tuple"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(UserError) as error:
        build("objective", spec, where="config.objective")
    assert message in str(error.value)
