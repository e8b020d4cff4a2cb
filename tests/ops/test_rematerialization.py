"""The schedule of programs on CPUs is the one that needs least memory."""

import jax
import pytest

from efficientllm import base_config, sharding
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.ops import rematerialization
from efficientllm.run_description import describe_run
from efficientllm.runtime import kernel_choice
from efficientllm.train import step

pytestmark = pytest.mark.quick


def scratch_bytes(kernel, dim, scan, rows, length):
    """Scratch memory of a training step of six layers."""
    config = base_config.get_config()
    config.model.num_layers, config.model.dim, config.model.scan = 6, dim, scan
    config.model.attention_kernel = kernel
    config.mesh, config.tokenizer, config.train.batch_size, config.train.length = "data=1", "bytes", rows, length
    described = describe_run(config, jax.devices()[:1])
    abstract = jax.eval_shape(step.init_state(described.lm, config.train, 0, length))
    where = sharding.shardings(abstract, described.mesh)
    jitted = step.jit_train_step(described.lm, config.train, described.mesh, where)
    batch = NEXT_TOKEN.batch_shapes(described.lm, rows, length, described.mesh)
    program = jitted.lower(sharding.abstract_shards(abstract, described.mesh), batch).compile()
    return program.memory_analysis().temp_size_in_bytes


# With the native attention the small step's 61 MB are 51 in XLA's own schedule, and the larger one's 97 are 104.
@pytest.mark.parametrize("case", [("xla", 64, False, 8, 128), ("auto", 256, True, 4, 512)], ids=str)
def test_a_step_needs_no_more_memory(case, monkeypatch):
    ours, limit = scratch_bytes(*case), 0.97 if rematerialization.compiler_options(None) else 1
    monkeypatch.setattr(rematerialization, "compiler_options", lambda *_: None)
    assert ours <= limit * scratch_bytes(*case)


def test_it_is_of_cpus_and_one_device_and_of_the_jax_that_needs_it(monkeypatch):
    monkeypatch.setattr(rematerialization, "_HOLDS_RESULTS", True)
    assert rematerialization.compiler_options(None)
    assert rematerialization.compiler_options(sharding.make_mesh("data=1", jax.devices()[:1]))
    assert rematerialization.compiler_options(sharding.make_mesh("data=2", jax.devices()[:2])) is None
    with kernel_choice.compiling_for("gpu"):
        assert rematerialization.compiler_options(None) is None
    monkeypatch.setattr(rematerialization, "_HOLDS_RESULTS", False)
    assert rematerialization.compiler_options(None) is None


@pytest.mark.parametrize("pattern, is_recurrent", [(("gqa | swiglu",), False), (("gqa | swiglu", "mamba"), True)])
def test_recurrences_are_in_the_schedule_of_xla(pattern, is_recurrent, monkeypatch):
    monkeypatch.setattr(rematerialization, "_HOLDS_RESULTS", True)
    config = base_config.get_config()
    config.model.size = "tiny(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64)"
    config.model.pattern, config.tokenizer = pattern, "bytes"
    lm = describe_run(config, jax.devices()[:1]).lm
    assert lm.is_recurrent == is_recurrent
    assert (rematerialization.compiler_options(None, lm.is_recurrent) is None) == is_recurrent
