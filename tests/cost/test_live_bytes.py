"""Bytes of intermediate arrays that exist at once, of programs whose arrays can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from efficientllm.cost.live_bytes import count_live_bytes

pytestmark = pytest.mark.quick
MATRIX = 4 * 16 * 16


def live(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_live_bytes(jax.jit(function).trace(*arguments).jaxpr)


def test_an_array_exists_until_it_is_read_last():
    def chain(x):
        return jnp.sin(jnp.cos(x @ x))

    assert live(chain, (16, 16)) == 2 * MATRIX  # what is read, and what is made of it

    def function(x):
        return (lambda y: jnp.sin(jnp.cos(y)) + y)(x @ x)

    assert live(function, (16, 16)) == 3 * MATRIX
    assert live(lambda x: x, (16, 16)) == 0  # inputs do not count


def test_a_loop_has_one_iteration_at_a_time_and_all_its_outputs():
    def body(carry, _):
        hidden = carry @ carry
        return jnp.sin(jnp.cos(hidden)), hidden

    def scan(x):
        return jax.lax.scan(body, x, None, length=5)

    # The new carry and five stacked outputs; inside, the cosine beside the carry and the output that it becomes.
    assert live(scan, (16, 16)) == (1 + 5 + 1) * MATRIX


def test_a_call_s_result_is_not_there_twice():
    inner = jax.jit(lambda x: x @ x)
    assert live(lambda x: jnp.sin(inner(x)), (16, 16)) == 2 * MATRIX
