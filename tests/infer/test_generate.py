"""Text from a model is made by one program, however often it is asked for."""

import jax
import numpy as np

import contract
from efficientllm.infer import generate as module


def test_a_second_call_compiles_nothing():
    lm = contract.build("mixer", "gqa")
    params, prompt = contract.parameters(lm), contract.tokens()[:, :5]
    module._generate.clear_cache()
    first = module.generate(lm, params, prompt, 4, 1.0, jax.random.key(0), 3)
    again = module.generate(lm, params, prompt, 4, 1.0, jax.random.key(0), 3)
    other = module.generate(lm, params, prompt + 1, 4, 1.0, jax.random.key(1), 3)
    assert module._generate._cache_size() == 1
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    module.generate(lm, params, prompt, 5, 1.0, jax.random.key(0), 3)
    assert module._generate._cache_size() == 2
