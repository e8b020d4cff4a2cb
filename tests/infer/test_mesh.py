"""Inference on eight devices: the tokens of one device, with sharded weights and caches."""

import flax.linen as nn
import jax
import pytest

import contract
from efficientllm import model, sharding
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy, Sample
from efficientllm.quant import apply
from efficientllm.weights import box_as
from tiers import slow_case, slow_except

NEW = 6
FORMS = ("float32", "int8", "int4")
CASES = [("mixer", "gqa", form) for form in FORMS] + [("mixer", "gqa(kv_cache='int8')", "float32")]
CASES += [("mixer", spec, "float32") for spec in ("mla", "window(window=5)", "mamba", "mamba2", "rwkv")]
CASES += [("ffn", "moe(num_experts=4, top_k=2, hidden=64)", form) for form in (*FORMS, "nf4", "bfloat16")]


def placed(lm, params, mesh):
    """Parameters, rounded or not, on the shards that their axes name."""
    boxed_params = box_as(model.abstract_params(lm), params)
    return jax.device_put(nn.unbox(boxed_params), sharding.shardings(boxed_params, mesh))


def answers(engine, prompts):
    *_, last = engine.generate(prompts, NEW, seed=3, chunk=4)
    return last


@pytest.mark.parametrize("mesh", ["data=2, fsdp=2, tensor=2", slow_case("tensor=2, data=4")])
@pytest.mark.parametrize("kind, spec, form", slow_except(CASES, ("mixer", "gqa", "int4")))
def test_eight_devices_write_what_one_writes(kind, spec, form, mesh, monkeypatch):
    monkeypatch.setattr("efficientllm.infer.engine.PREFILL_CHUNKS", (8,))
    lm, params = model.unroll(contract.build(kind, spec), contract.parameters(contract.build(kind, spec)))
    params = apply.quantize(params, form)
    # Of one length, and of several: a piece and a rest.
    for lengths in ((9,) * 8, (11, 5, 16, 9, 12, 6, 8, 10)):
        prompts = [contract.tokens()[row, :length].tolist() for row, length in enumerate(lengths)]
        alone = answers(Engine(lm, params, Greedy(), -1, 24), prompts)
        mesh_ = sharding.make_mesh(mesh)
        with jax.set_mesh(mesh_):
            engine = Engine(lm, placed(lm, params, mesh_), Greedy(), -1, 24)
            assert answers(engine, prompts) == alone


def test_states_lie_in_parts():
    mesh = sharding.make_mesh("data=2, fsdp=2, tensor=2")
    lm, params = model.unroll(contract.build("mixer", "gqa"), contract.parameters(contract.build("mixer", "gqa")))
    with jax.set_mesh(mesh):
        engine = Engine(lm, placed(lm, params, mesh), Sample(repetition_penalty=1.1), -1, 24)
        prompts = [contract.tokens()[row, :8].tolist() for row in range(8)]
        carry = engine.prefill(prompts)
        carry, _ = engine.decode(carry, prompts, 2)
    for leaf in jax.tree.leaves(carry.states):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size  # rows over four, heads over two
