"""Rules that give each parameter its rate and decay, and the optimizer of them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from efficientllm.errors import UserError
from efficientllm.optim import from_config

pytestmark = pytest.mark.quick


def test_optimizer_is_adamw_with_decay_and_rates_by_name():
    train = base.get_config().train
    train.rates, train.clip = (("b$", 0.5), (".*", 1.0)), 0.0
    train.decay = (("kernel$", 0.1), (".*", 0.0))
    params = {"kernel": jnp.full((2, 3), 2.0), "b": jnp.ones(3)}
    grads = {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.array([0.3, -2.0, 1.0])}
    tx, lr = from_config.optimizer(train, params), from_config.schedule(train)
    reference = {
        "kernel": optax.adamw(lr, b1=0.9, b2=0.95, weight_decay=0.1),
        "b": optax.adamw(lambda count: 0.5 * lr(count), b1=0.9, b2=0.95, weight_decay=0.0),
    }
    state, states = tx.init(params), {name: optimizer.init(params[name]) for name, optimizer in reference.items()}
    for _ in range(40):
        updates, state = tx.update(grads, state, params)
        for name, optimizer in reference.items():
            expected, states[name] = optimizer.update(grads[name], states[name], params[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-6, atol=1e-9)
        params = optax.apply_updates(params, updates)


def test_rules_must_cover_every_parameter():
    with pytest.raises(UserError, match="no rule matches parameter 'a/b'"):
        from_config.match((("c", 1.0),), {"a": {"b": 1.0}}, "config.train.decay")
    with pytest.raises(UserError, match="pairs of"):
        from_config.match((("(", 1.0),), {"a": 1.0}, "config.train.decay")


def test_a_rate_that_reaches_no_parameter_is_refused():
    """A rule behind others that take all its parameters does reach them."""
    train = base.get_config().train
    params = {"vision": {"projector": jnp.ones(3)}, "norm": jnp.ones(2)}
    train.rates = (("visoin", 0.1), (".*", 1.0))
    with pytest.raises(UserError, match="config.train.rates: 'visoin' matches no trained parameter; .* norm, vision"):
        from_config.optimizer(train, params)
    train.rates = (("^vision/", 0.1), ("^norm", 1.0), (".*", 1.0))
    from_config.optimizer(train, params)
