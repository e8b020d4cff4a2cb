"""Random initialization by groups of layers."""

import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from configs import base, mixers
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.infer import random_weights
from efficientllm.quant import apply as quant
from tiers import slow_except


def described(**changes):
    config = base.get_config()
    config.model.unroll = 0
    config.model.update({"size": "tiny(num_layers=2, dim=64, hidden=96)"} | changes)
    return from_config.from_config(config.model, 320).clone(scan=False)


CASES = {
    "dense": {},
    "half layers": mixers.VARIANTS["mamba"],
    "pairs": {"pattern": ("gqa", "mqa"), "tied": False, "size": "tiny"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except(CASES, "dense", "half layers"))
def test_it_is_as_the_model_initialises(case):
    lm = described(**CASES[case])
    drawn = traverse_util.flatten_dict(random_weights.draw(lm, 0, lambda path, array: array), sep="/")
    exact = jax.jit(lambda key: nn.unbox(model.init_params(lm, key, 8)))(jax.random.key(1))
    exact = traverse_util.flatten_dict(exact, sep="/")
    assert {path: leaf.shape for path, leaf in drawn.items()} == {path: leaf.shape for path, leaf in exact.items()}
    for path, leaf in drawn.items():  # of the same distribution
        np.testing.assert_allclose(leaf.std(), exact[path].std(), rtol=0.3, atol=1e-6, err_msg=path)


def test_no_two_layers_are_the_same_and_a_seed_repeats_them():
    lm = described()
    first, again, other = (random_weights.draw(lm, seed, lambda path, array: np.asarray(array)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [
        np.asarray(leaf).tobytes()
        for params in (first, other)
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
        if re.search("kernel|embedding", path)
    ]
    assert len(set(kernels)) == len(kernels)


def test_layers_are_compiled_once_and_rounded_as_they_come(monkeypatch):
    lm, traced, live_bytes = described(), [], []
    once = model.init_params
    monkeypatch.setattr(
        random_weights, "init_params", lambda lm, *rest: traced.append(lm.num_layers) or once(lm, *rest)
    )
    rounded = quant.rounder("int4()")
    params = random_weights.draw(lm, 0, lambda path, array: live_bytes.append(array.size) or rounded(path, array))
    assert set(traced) == {1} and len(traced) <= 4  # the shapes, the embedding, the norm, a layer
    assert len(live_bytes) == len(jax.tree.leaves(model.abstract_params(lm), is_leaf=lambda x: hasattr(x, "names")))
    plain = random_weights.draw(lm, 0, lambda path, array: array)
    jax.tree.map(np.testing.assert_array_equal, params, quant.quantize(plain, "int4()"))
