"""The moving average of the parameters: its recursion, and the parameters that are evaluated."""

import functools

import jax
import numpy as np
import pytest

import contract
from configs import base
from efficientllm.adapters.freeze import Full
from efficientllm.model import abstract_params
from efficientllm.train import step

DECAY = 0.9


@pytest.fixture(scope="module")
def states():
    """The states of four steps, from the first on."""
    lm, train = contract.build("mixer", "gqa"), base.get_config().train
    train.ema = DECAY
    state = step.create(lm, train, Full(), 0, abstract_params(lm), contract.parameters(lm))
    run, states = jax.jit(functools.partial(step.train_step, lm, train, Full())), [state]
    for _ in range(3):
        states.append(run(states[-1], contract.batch())[0])
    return states


def test_the_average_is_its_recursion(states):
    mean = jax.device_get(states[0].params)
    for state in states[1:]:
        mean = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * np.asarray(new), mean, state.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), mean, states[-1].ema)


def test_evaluation_takes_the_average_and_training_does_not(states):
    state = states[-1]
    jax.tree.map(np.testing.assert_array_equal, state.eval_params, state.ema)
    jax.tree.map(np.testing.assert_array_equal, state.all_params, state.params)
    assert not np.allclose(state.eval_params["embedding"], state.all_params["embedding"])
