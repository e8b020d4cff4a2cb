"""Products by heads in C++ against NumPy: both layouts, every instruction set and type, and awkward sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ops import native

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not native.instruction_sets(), reason="no compiler: no native library"),
]
SHAPES = {"mla": (1, 8, 128, 32, 32), "odd": (3, 5, 21, 7, 11), "wide": (2, 3, 130, 70, 64)}


@pytest.mark.parametrize("heads_in_rows", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_both_products_are_those_of_the_formula(instructions, shape, dtype, heads_in_rows):
    B, H, R, n, v = SHAPES[shape]
    rng = np.random.default_rng(R)
    kernel = jnp.asarray(rng.normal(size=(R, H, n + v)), dtype)
    stored = kernel.reshape(R, -1)
    stored = stored.T if heads_in_rows else stored
    exact = np.asarray(kernel.astype(jnp.float32), np.float64)
    for part, over_rank, form in ((slice(0, n), False, "bhn,rhn->bhr"), (slice(n, n + v), True, "bhr,rhv->bhv")):
        x = jnp.asarray(rng.normal(size=(B, H, R if over_rank else n)), jnp.float32)
        actual = native.head_products(x, stored, part, n + v, over_rank, heads_in_rows, instructions)
        expected = np.einsum(form, np.asarray(x, np.float64), exact[..., part])
        terms = np.einsum(form, abs(np.asarray(x, np.float64)), abs(exact[..., part]))
        bound = (x.shape[-1] + 1) * 2.0**-24 * terms  # each product and each sum rounds once
        assert np.max(abs(np.asarray(actual) - expected) / bound) <= 1


def test_sizes_that_do_not_go_are_refused():
    x, weights = jnp.zeros((1, 2, 3)), jnp.zeros((4, 10))
    with pytest.raises(Exception, match="sizes that do not go"):
        native.head_products(x, weights, slice(3, 6), 5, False).block_until_ready()
    with pytest.raises(Exception, match="columns of every head"):
        native.head_products(x, weights, slice(0, 3), 4, False).block_until_ready()
