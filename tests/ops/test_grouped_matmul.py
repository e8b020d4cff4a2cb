"""Every grouped kernel is the plain loop over groups, in value and gradient, under every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ops.grouped_matmul import grouped_matmul
from efficientllm.registry import names
from efficientllm.runtime import kernel_choice

K, N = 24, 40
# Rows of each group: uneven; empty ones, the last too; one row in all; one group; blocks that end beyond the last row;
# groups of many blocks.
SIZES = {
    "uneven": (5, 19, 1, 39),
    "empty": (0, 7, 0, 3, 0),
    "one row": (0, 1),
    "one group": (17,),
    "many blocks": (300, 3, 129, 80),
}


def operands(sizes, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((sum(sizes), K), np.float32)
    w = random.standard_normal((len(sizes), K, N), np.float32)
    dy = random.standard_normal((sum(sizes), N), np.float32)
    return x, w, dy


def expected(x, w, dy, sizes):
    """Product and gradients in float64, group by group."""
    x, w, dy = (array.astype(np.float64) for array in (x, w, dy))
    stops = np.cumsum(sizes)
    groups = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    y = np.concatenate([x[rows] @ w[e] for e, rows in enumerate(groups)])
    dx = np.concatenate([dy[rows] @ w[e].T for e, rows in enumerate(groups)])
    return y, dx, np.stack([x[rows].T @ dy[rows] for rows in groups])


def value_and_gradients(x, w, dy, sizes, precision, kernel):
    def run(x, w):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, precision, kernel), x, w)
        return (y, *pullback(dy.astype(y.dtype)))

    return jax.jit(run)(x, w)


def close(arrays, expected, tolerance):
    for array, exact in zip(arrays, expected, strict=True):
        error = np.abs(np.asarray(array, np.float64) - exact).max() / max(1e-30, np.abs(exact).max())
        assert error <= tolerance, error


@pytest.mark.parametrize("kernel", names("grouped_kernel"))
@pytest.mark.parametrize("case", SIZES)
def test_kernel_is_the_loop_over_groups(kernel, case):
    sizes = SIZES[case]
    x, w, dy = operands(sizes)
    close(value_and_gradients(x, w, dy, jnp.array(sizes), "float32", kernel), expected(x, w, dy, sizes), 1e-6)


def test_equal_groups_need_no_sizes():
    x, w, dy = operands((8, 8, 8))
    with kernel_choice.recording_kernels() as used:
        result = value_and_gradients(x, w, dy, None, "float32", "auto")
    close(result, expected(x, w, dy, (8, 8, 8)), 1e-6)
    assert used == {"grouped_matmul": {"batched"}}


@pytest.mark.parametrize("kernel", ["batched", *names("grouped_kernel")])
@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_operands_are_rounded_and_sums_are_not(kernel, precision):
    """In both passes: against the exact product of the rounded operands, the error is that of one rounding at most."""
    sizes = (64, 64, 64)
    x, w, dy = operands(sizes)
    rounded = [np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32) for array in (x, w, dy)]
    operand = jnp.asarray(x, jnp.bfloat16) if precision == "bfloat16" else x
    sizes_E, name = (None, "auto") if kernel == "batched" else (jnp.array(sizes), kernel)
    y, dx, dw = value_and_gradients(operand, w, dy, sizes_E, precision, name)
    assert (y.dtype, dx.dtype, dw.dtype) == (operand.dtype, operand.dtype, jnp.float32)
    exact = expected(*rounded, sizes)
    close((y, dx), exact[:2], 2**-8 if precision == "bfloat16" else 1e-6)
    close((dw,), exact[2:], 1e-6)


def test_sizes_may_change_without_compiling_again():
    x, w, dy = operands((5, 19, 1, 39))
    run = jax.jit(lambda sizes: grouped_matmul(x, w, sizes, "float32", "blocked"))
    for sizes in ((5, 19, 1, 39), (64, 0, 0, 0), (0, 0, 32, 32)):
        close((run(jnp.array(sizes)),), expected(x, w, dy, sizes)[:1], 1e-6)
    assert run._cache_size() == 1


def test_a_row_is_a_function_of_itself_and_its_matrix():
    x, w, _ = operands((5, 19, 1, 39))
    run = jax.jit(lambda x: grouped_matmul(x, w, jnp.array((5, 19, 1, 39)), "float32", "blocked"))
    changed = run(np.where(np.arange(64)[:, None] == 7, np.nan, x))
    rest = np.arange(64) != 7
    np.testing.assert_array_equal(changed[rest], run(x)[rest])
    assert np.isnan(changed[7]).all()


@pytest.mark.slow
def test_few_rows_touch_few_matrices():
    """A decoded token must not pay for all experts: neither converted copies of them, nor as many as fit a block."""
    E, wide = 64, 256
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    for precision, stored in (("float32", "float32"), ("mixed", "float32"), ("bfloat16", "bfloat16")):
        x, w = (jax.ShapeDtypeStruct(shape, stored) for shape in ((4, wide), (E, wide, wide)))
        run = jax.jit(lambda x, w, sizes, p=precision: grouped_matmul(x, w, sizes, p, "blocked"))
        temporary = run.lower(x, w, sizes).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 4 * wide * wide * 4  # bytes of four matrices of the 64


@pytest.mark.parametrize("platform, kernel", [("cpu", "blocked"), ("gpu", "blocked"), ("tpu", "ragged_dot")])
def test_platform_chooses(platform, kernel, monkeypatch):
    monkeypatch.setattr(kernel_choice, "platform", lambda: platform)
    x, w, _ = operands((4, 4))
    with kernel_choice.recording_kernels() as used:
        jax.eval_shape(lambda: grouped_matmul(x, w, jnp.array((4, 4)), "float32"))
    assert used == {"grouped_matmul": {kernel}}


def test_unknown_kernel():
    x, w, _ = operands((4, 4))
    with pytest.raises(UserError, match="'blockd'.*known: blocked, ragged_dot.*did you mean 'blocked'"):
        grouped_matmul(x, w, jnp.array((4, 4)), "float32", "blockd")
