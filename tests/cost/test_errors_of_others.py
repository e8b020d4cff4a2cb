"""Errors seen in other tools, as tests of models whole. Those of single parts stand beside their parts:

two generations in one timer and a stability threshold that is not relative: test_timer.py; decoded tokens as samples:
test_paper.py; a peak out of two looks: test_memory.py; counters that fall, are missing or stand still: test_energy.py;
frozen weights with a full backward: test_flops.py and adapters/test_methods.py.
"""

import dataclasses

import jax
import numpy as np
import pytest

import contract
from efficientllm import model
from efficientllm.cost import formulas
from efficientllm.infer import measure
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.sampler import Sampler

pytestmark = pytest.mark.quick

LAYERS, WIDTH = 2, 32  # of contract.SIZE: 4 heads of 8


def cost(mixer, length):
    """Forward FLOPs a token of contract's small model with `mixer`."""
    lm = contract.build("mixer", mixer)
    return formulas.forward_flops(lm, model.abstract_params(lm), length) / length


@pytest.mark.parametrize(("mixer", "grows"), [("gqa", True), ("mla", True), ("mamba", False), ("rwkv", False)])
def test_a_step_costs_what_its_architecture_costs_at_its_length(mixer, grows):
    """One formula for all, or one without the length, would give 6 N for each of them at every length."""
    difference = cost(mixer, 256) - cost(mixer, 128)
    if not grows:
        assert difference == 0
        return
    scores = 8 + 4 if mixer == "mla" else 8  # a latent's key has its rotated part besides
    values = 8
    assert difference == LAYERS * 4 * (scores + values) * 2 * (256 - 128) / 2  # heads, multiply-add, causal half


def test_experts_that_a_token_never_meets_cost_and_count_nothing():
    few, many = (contract.build("ffn", f"moe(num_experts={count}, top_k=2)") for count in (4, 16))
    counted = [formulas.count_parameters(lm, model.abstract_params(lm)) for lm in (few, many)]
    assert counted[1]["total"] > 2 * counted[0]["total"]
    router = LAYERS * WIDTH * (16 - 4)
    assert counted[1]["active"] - counted[0]["active"] == router
    flops = [formulas.forward_flops(lm, model.abstract_params(lm), 64) for lm in (few, many)]
    assert flops[1] - flops[0] == 2 * 64 * router


def test_a_latent_cache_holds_the_latent_and_no_keys_and_values():
    lm, length = contract.build("mixer", "mla(kv_rank=16)"), 40
    states = jax.eval_shape(lambda: model.init_states(lm, 1, length))
    elements = sum(leaf.size for leaf in jax.tree.leaves(states) if leaf.dtype == np.float32)
    assert elements == LAYERS * length * (16 + 4)
    assert elements < LAYERS * length * 2 * 4 * 8  # keys and values of all heads


@dataclasses.dataclass
class Carry:
    """As much of the engine's as measuring looks at."""

    positions_B: object

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class Recording:
    """An engine that only remembers which prompts it was given."""

    def __init__(self):
        self.prefilled = []

    def prefill(self, prompts):
        self.prefilled.append(prompts)
        return Carry(jax.numpy.full(len(prompts), len(prompts[0])))

    def decode(self, carry, prompts, steps):
        return carry, np.zeros((len(prompts), steps))


def test_no_repeat_meets_a_prompt_that_an_earlier_one_has_left_in_a_cache():
    engine, reader = Recording(), energy.open_reader(jax.local_devices())
    sampler = Sampler(jax.local_devices()[:1], reader, 0.05).start()
    try:
        measured = measure.measure(engine, np.arange(10_000), 3, 16, 2, 4, reader, sampler)
    finally:
        sampler.stop()
    assert measured.prefills == 4
    assert len(engine.prefilled) == measure.WARM_UPS + 4 + 4  # throughput, then latencies
    rows = [tuple(row) for prompts in engine.prefilled for row in prompts]
    assert len(set(rows)) == len(rows)
