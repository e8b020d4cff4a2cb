"""Times of operations in a trace: shares of what runs at once, and of what runs within another."""

import jax
import jax.numpy as jnp
import pytest

from efficientllm.metrics import trace

pytestmark = pytest.mark.quick
A, B, C = (("jit_step", name) for name in "abc")


def test_what_runs_at_once_shares_the_time():
    lines = [[(0, 10, A), (20, 30, A)], [(5, 25, B)]]
    assert trace._shares(lines) == {A: 5 + 2.5 + 2.5 + 5, B: 2.5 + 10 + 2.5}


def test_what_runs_within_another_has_its_own_time():
    spans = [(0, 100, A), (10, 40, B), (20, 30, C), (40, 50, B), (90, 100, C)]
    assert trace._shares([spans]) == {A: 10 + 40, B: 20 + 10, C: 10 + 10}


def test_spans_that_touch_leave_none_running():
    assert trace._shares([[(0, 5, A), (5, 9, A), (9, 9.5, B)], [(5, 9, B)]]) == {A: 5 + 2, B: 2 + 0.5}


def test_a_trace_names_the_operations_of_the_module_that_is_asked_for(tmp_path):
    @jax.jit
    def wanted(x):
        return jnp.tanh(x @ x)

    x = jnp.ones((64, 64))
    jax.block_until_ready((wanted(x), jnp.sin(x)))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready([wanted(x) for _ in range(3)])
        jax.block_until_ready(jnp.sin(x))
    file = trace.newest_file(tmp_path)
    seconds = trace.seconds_by_operation(file, ["jit_wanted"])["jit_wanted"]
    text = wanted.lower(x).compile().as_text()
    assert seconds and all(f"%{name} =" in text for name in seconds)
    assert trace.seconds_by_operation(file, ["jit_another"]) == {"jit_another": {}}
    assert trace.newest_file(tmp_path / "empty") is None
