"""Residuals of recurrent mixers in training: memory beside attention's, and gradients through what is recomputed."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import attention, mixers
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.ops import rematerialization
from efficientllm.plan import training_step
from tests.contract import loss_fn
from tiers import slow_case

MIXERS = ("mamba", "mamba2", "rwkv")
T = 40


@functools.cache
def peak(name, length):
    """Bytes of a step of one row at 1.5B in bfloat16 on a GPU, from shapes."""
    config = (mixers if name in MIXERS else attention).get_config(name)
    config.model.size, config.model.precision = "1.5b", "bfloat16"
    config.train.batch_size, config.train.length = 1, length
    step = training_step.describe(config, jax.devices()[:1], "gpu", (9, 0))
    return step.memory_parts["activations"] + step.memory_parts["gradients"]


@pytest.mark.parametrize("name", ["mamba", slow_case("mamba2"), slow_case("rwkv")])
def test_long_rows_take_little_more_memory_than_with_attention(name):
    assert peak(name, 8192) <= 1.3 * peak("gqa", 8192)
    assert peak(name, 8192) <= 2 * peak(name, 4096)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_those_of_saved_residuals(name, monkeypatch):
    config = mixers.get_config(name).model
    config.size, config.parameters_of = "tiny(num_layers=1, dim=64)", ""
    lm = from_config.from_config(config, 96)
    params = nn.unbox(model.init_params(lm, jax.random.key(0), T))
    ids = np.random.default_rng(0).integers(0, 96, (2, T + 1))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": np.ones((2, T), np.int32)}
    batch |= {"positions": np.arange(T, dtype=np.int32)[None].repeat(2, 0), "weights": np.ones((2, T), np.float32)}

    def value_and_gradients():
        step = jax.value_and_grad(lambda params: loss_fn(lm, params, batch, 2 * T)[0])
        program = jax.make_jaxpr(step)(params)
        return jax.jit(step)(params), str(program).count("prevent_cse")

    saved, few = value_and_gradients()
    monkeypatch.setattr(rematerialization, "LONG", T - 1)
    recomputed, more = value_and_gradients()
    assert more > few, "nothing was recomputed"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), recomputed, saved)
