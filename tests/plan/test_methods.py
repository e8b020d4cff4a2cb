"""Which tuning methods are one program, so that one plan speaks for them."""

import re

import jax
import pytest

from configs import tune
from efficientllm.plan import training_step

SIZE = (
    "custom(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=48, rope_base=1e4, vocab_size=264)"
)
NUMBER = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?|-?inf")


def program(method):
    """A step's jaxpr, with a blank for each of its floating constants."""
    config = tune.get_config(method)
    config.model.size, config.train.length = SIZE, 32
    config.adapter = config.adapter.replace("rank=64, alpha=128", "rank=4, alpha=12")
    return NUMBER.sub("_", str(training_step.traced(training_step.describe(config, jax.devices()[:1], "cpu"))[0].jaxpr))


@pytest.fixture(scope="module")
def lora():
    return program("lora")


@pytest.mark.parametrize("method", ["rslora", "lora_plus", "pissa"])
def test_differ_from_lora_in_constants_alone(lora, method):
    assert program(method) == lora


def test_others_do_not(lora):
    assert program("dora") != lora
