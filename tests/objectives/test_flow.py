"""Rectified flow against its formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fake_denoisers as fake
from efficientllm.errors import UserError
from efficientllm.objectives.flow import Flow, shifted
from efficientllm.registry import build

pytestmark = pytest.mark.quick


def test_the_shift_has_the_values_of_the_paper():
    assert shifted(np.float64(1 / 1000), 3.0) == pytest.approx(0.002994, abs=1e-6)
    assert shifted(np.array([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


def test_levels_are_logit_normal_and_then_shifted():
    """The median and the quartiles of the normal, through the sigmoid and the shift."""
    objective = Flow(shift=3.0, mean=0.5, std=2.0)
    sigma = np.asarray(objective.draw_times(jax.random.key(0), 200_000))
    for quantile, z in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        u = 1 / (1 + math.exp(-(0.5 + 2 * z)))
        assert np.quantile(sigma, quantile) == pytest.approx(3 * u / (1 + 2 * u), abs=0.004)
    uniform = np.asarray(Flow(density="uniform").draw_times(jax.random.key(0), 100_000))
    np.testing.assert_allclose(np.quantile(uniform, (0.1, 0.5, 0.9)), (0.1, 0.5, 0.9), atol=0.006)


@pytest.mark.parametrize("weight", ("one", "sigma2"))
def test_the_loss_and_its_gradient_are_those_of_the_formula(weight):
    objective, params, batch = Flow(weight=weight, shift=2.0), fake.kernel(), fake.batch()
    batch["weights"] = jnp.array([1.0, 0.0, 1.0, 1.0])
    model, key = fake.Recorded(fake.wave), jax.random.key(3)
    loss = jax.value_and_grad(lambda params: objective.loss(model, params, batch, key, jnp.float32(3)), has_aux=True)
    (value, metrics), gradient = jax.jit(loss)(params)
    x, level, label = metrics["aux"][0]["inputs"]
    sigma = level / 1000
    velocity = (x - batch["images"]) / sigma  # x = x0 + sigma v

    def formula(params):
        errors = jnp.square(fake.wave(x, level, label, params) - velocity).mean((1, 2, 3))
        errors *= sigma[:, 0, 0, 0] ** 2 if weight == "sigma2" else 1
        return (errors * batch["weights"]).sum() / 3

    expected, expected_gradient = jax.jit(jax.value_and_grad(formula))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient["kernel"], expected_gradient["kernel"], rtol=1e-3, atol=1e-5)


def test_sigma2_is_the_error_of_the_picture():
    objective, batch = Flow(weight="sigma2"), fake.batch()
    noise, wrong = (jax.random.normal(jax.random.key(i), batch["images"].shape) for i in range(2))
    sigma = jnp.array([0.1, 0.4, 0.7, 0.95])
    x = objective.add_noise(batch["images"], noise, sigma)
    losses = objective.training_losses(wrong, batch["images"], noise, sigma)
    np.testing.assert_allclose(
        losses, jnp.square(objective.to_image(x, wrong, sigma) - batch["images"]).mean((1, 2, 3)), rtol=1e-5
    )


def test_conversions_undo_the_noise():
    objective, x0 = Flow(), fake.batch()["images"]
    noise, sigma = jax.random.normal(jax.random.key(0), x0.shape), jnp.array([0.0, 0.3, 0.9, 1.0])
    x = objective.add_noise(x0, noise, sigma)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_array_equal(x[3], noise[3])
    np.testing.assert_allclose(objective.to_image(x, noise - x0, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(objective.to_noise(x, noise - x0, sigma), noise, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(UserError, match="^objective: predicts no variance"):
        Flow().check(fake.Fixed(fake.wave, learned_sigma=True))
    for spec, message in (
        ("flow(weight='two')", "is none of one, sigma2"),
        ("flow(density='normal')", "is none of logit_normal, uniform"),
        ("flow(shift=0.0)", "shift = 0.0: must be above 0"),
    ):
        with pytest.raises(UserError) as error:
            build("objective", spec, where="config.objective")
        assert message in str(error.value)
