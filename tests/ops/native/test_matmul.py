"""Matrix products in C++ against float64: every instruction set, layout, dtype and awkward size; where they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm import matrix_product, sharding, weights
from efficientllm.cost import jaxpr_flops
from efficientllm.ops.native import matmul as native
from efficientllm.runtime import kernel_choice

KERNELS = [(product, name) for product in ("float32", "bfloat16") for name in native.instruction_sets(product)]
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not KERNELS, reason="no compiler, or a CPU without AVX-512"),
]
SIZES = [(1, 1, 1), (7, 5, 3), (33, 65, 31), (64, 32, 96), (129, 2100, 40), (5, 17, 2100), (2060, 3, 33), (3, 0, 5)]


def rounded(array, dtype):
    """The values of an array rounded to `dtype`, in float64."""
    return np.asarray(jnp.asarray(array, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)


def check(actual, a, b):
    """Compares with `a @ b` in float64, within the bound of rounding.

    A product of two bfloat16 is exact in float32, one of two float32 is rounded once, and a sum of k of them k times
    more, by at most u = 2^-24 of what has been summed. A result in bfloat16 is rounded once more, by 2^-8.
    """
    exact = a @ b
    bound = (a.shape[1] + 1) * 2.0**-24 * (abs(a) @ abs(b))
    if actual.dtype == jnp.bfloat16:
        bound += 2.0**-8 * (abs(exact) + bound)
    assert np.all(abs(np.asarray(actual.astype(jnp.float32), np.float64) - exact) <= bound)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("product, instructions", KERNELS)
def test_products_are_those_of_rounded_operands(product, instructions, size):
    m, k, n = size
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    for layout in range(4):
        transpose_a, transpose_b = bool(layout & 1), bool(layout & 2)
        for dtype, out_dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")):
            a_stored, b_stored = jnp.asarray(a.T if transpose_a else a, dtype), jnp.asarray(b.T if transpose_b else b)
            y = native.matmul(a_stored, b_stored, product, out_dtype, transpose_a, transpose_b, instructions)
            assert y.dtype == out_dtype
            check(y, rounded(rounded(a, dtype), product), rounded(b, product))


@pytest.mark.parametrize("product, instructions", KERNELS)
def test_the_bound_sees_a_number_that_is_left_out(product, instructions):
    a, b = np.ones((40, 70), np.float32), np.ones((70, 40), np.float32)
    y = native.matmul(jnp.asarray(a[:, 1:]), jnp.asarray(b[1:]), product, "float32", instructions=instructions)
    with pytest.raises(AssertionError):
        check(y, rounded(a, product), rounded(b, product))


def test_matrices_that_do_not_fit_are_refused():
    product, name = KERNELS[0]
    ones = jnp.ones
    call = jax.ffi.ffi_call(native.TARGET, jax.ShapeDtypeStruct((4, 6), jnp.float32))
    attributes = {"transpose_a": False, "transpose_b": False, "is_half": product == "bfloat16", "instructions": name}
    np.testing.assert_array_equal(call(ones((4, 5)), ones((5, 6)), **attributes), 5)
    for wrong, message in (
        ((ones((4, 5)), ones((6, 6))), "sizes do not fit"),
        ((ones((3, 5)), ones((5, 6))), "sizes do not fit"),
        ((ones((4, 5)), ones((5, 6), jnp.int32)), "another type"),
        ((ones((4, 5, 1)), ones((5, 6))), "no matrices"),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call(*wrong, **attributes))
    with pytest.raises(Exception, match="no such instruction set"):
        jax.block_until_ready(call(ones((4, 5)), ones((5, 6)), **attributes | {"instructions": "mmx"}))


def gradients(precision, kernel_of, x, w, dy):
    """`(y, dx, dw)` of a product in a precision."""
    y, pull = jax.vjp(lambda x, w: weights.matmul(x, kernel_of(w), precision), x, w)
    return y, *pull(dy.astype(y.dtype))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
def test_products_of_models_and_their_gradients(precision, tied):
    """`weights.matmul` in both passes, also for a tied head: the gradient of the kernel is native."""
    policy = weights.Precision.of(precision)
    if not native.instruction_sets(policy.product):
        pytest.skip("no kernels for this precision")
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in ((3, 184, 48), (48, 40), (3, 184, 40)))
    assert max(matrix_product.LEAST_NATIVE.values()) < 3 * 184 * 48 * 40
    operands = jnp.asarray(x, policy.activation), jnp.asarray(w.T if tied else w), jnp.asarray(dy, policy.activation)
    of_table = weights.transposed_kernel if tied else lambda w: w
    with kernel_choice.recording_kernels() as used:
        y, dx, dw = jax.jit(gradients, static_argnums=(0, 1))(precision, of_table, *operands)
    assert used[f"matmul_{policy.product.name}"] == {native.instruction_sets(policy.product)[-1]}
    assert y.dtype == dx.dtype == policy.activation and dw.dtype == jnp.float32
    x, w, dy = (rounded(array, policy.product) for array in (x, w, dy))
    x_rows, dy_rows = x.reshape(-1, 48), dy.reshape(-1, 40)
    check(y.reshape(-1, 40), x_rows, w)
    check(dx.reshape(-1, 48), dy_rows, w.T)
    check(dw.T if tied else dw, x_rows.T, dy_rows)


def test_products_are_counted_in_the_program():
    def flops(precision):
        arrays = jnp.ones((3, 24, 48)), jnp.ones((48, 40)), jnp.ones((3, 24, 40))
        return jaxpr_flops.count_needed_flops(lambda *a: gradients(precision, lambda w: w, *a), *arrays)

    for precision in ("float32", "mixed", "bfloat16"):
        assert flops(precision) == 3 * 2 * 72 * 48 * 40


def test_rows_of_a_vmap_are_multiplied_one_after_another():
    product, _ = KERNELS[-1]
    x, w = jnp.ones((2, 33, 40)), jnp.ones((40, 50))
    y = jax.vmap(lambda x: native.matmul(x, w, product, "float32"))(x)
    np.testing.assert_array_equal(y, np.full((2, 33, 50), 40))


def test_xla_multiplies_on_meshes_on_other_platforms_and_below_an_instruction_set(monkeypatch):
    product, _ = KERNELS[0]
    assert native.is_usable(product) and not native.is_usable("float16")
    with jax.set_mesh(sharding.make_mesh("data=8", jax.devices())):
        assert not native.is_usable(product)
    with kernel_choice.compiling_for("gpu"):
        assert not native.is_usable(product)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert not native.is_usable("float32") and not native.is_usable("bfloat16")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX512_BF16 --xla_x")
    assert "amx" not in native.instruction_sets("bfloat16")


def test_products_of_few_numbers_are_xlas():
    """A panel has 32 rows: a kernel of an adapter's rank, or a token's row, would be zeros mostly."""
    with kernel_choice.recording_kernels() as used:
        for rows, features in ((4096, 8), (8, 4096)):
            gradients("mixed", lambda w: w, jnp.ones((rows, 64)), jnp.ones((64, features)), jnp.ones((rows, features)))
    assert not used


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_products_are_native_from_the_least_work_on(precision):
    product = weights.Precision.of(precision).product
    if not native.instruction_sets(product):
        pytest.skip("no kernels for this precision")
    least = matrix_product.LEAST_NATIVE[product.name]
    for rows, kernels in ((least // 64**2 - 1, set()), (least // 64**2, {f"matmul_{product.name}"})):
        with kernel_choice.recording_kernels() as used:
            gradients(precision, lambda w: w, jnp.ones((rows, 64)), jnp.ones((64, 64)), jnp.ones((rows, 64)))
        assert set(used) == kernels
