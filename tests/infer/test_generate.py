"""Text from a model is made by one program, however often it is asked for."""

import jax
import numpy as np
import pytest

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


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_full_pass_and_stops_at_the_end_of_text():
    lm = contract.build("mixer", "gqa")
    params, prompt = contract.parameters(lm), contract.tokens()[:2, :5]
    found = np.asarray(module.generate(lm, params, prompt, 6, 0, jax.random.key(0), eos_id=-1))
    text = prompt
    for _ in range(6):
        text = np.concatenate([text, np.argmax(contract.logits(lm, text)[:, -1:], -1)], 1)
    np.testing.assert_array_equal(found, text[:, 5:])
    eos = int(found[0, 2])
    stopped = np.asarray(module.generate(lm, params, prompt[:1], 6, 0, jax.random.key(0), eos_id=eos))[0]
    first = list(found[0]).index(eos)
    assert list(stopped[: first + 1]) == list(found[0, : first + 1]) and set(stopped[first:]) == {eos}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gqa", "window(window=5)"])
def test_a_kernel_for_training_does_not_change_what_is_generated(mixer):
    prompt = contract.tokens()[:2, :7]
    texts = []
    for kernel in ("auto", "chunked", "splash"):
        lm = contract.build("mixer", mixer, attention_kernel=kernel)
        params = contract.parameters(contract.build("mixer", mixer))
        texts.append(np.asarray(module.generate(lm, params, prompt, 6, 0, jax.random.key(0), eos_id=-1)))
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(texts[0], texts[2])
