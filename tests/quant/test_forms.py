"""Quantized forms: arithmetic by formula, bytes, and products on every kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ops import native
from efficientllm.ops.native import matmul as matmul_products
from efficientllm.quant import matmul as products
from efficientllm.quant.apply import form_of, quantize
from efficientllm.quant.base import into_groups
from efficientllm.quant.int4 import Int4
from efficientllm.quant.nf4 import TABLE
from efficientllm.runtime import kernel_choice
from efficientllm.weights import Precision, matmul, matmul_together, resident_bytes, take
from tiers import slow_case, slow_except

pytestmark = pytest.mark.quick

SPECS = ["bfloat16", "float16", "int8", "int8(group=32)", "int4", "int4(group=64, symmetric=False)", "nf4"]
BITS = {"bfloat16": 16, "float16": 16, "int8(group=32)": 9, "int4": 4.5, "int4(group=64, symmetric=False)": 4.375}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def leaf(spec, kernel):
    return quantize({"kernel": jnp.asarray(kernel)}, spec)["kernel"]


def relative(actual, exact):
    return np.linalg.norm(np.asarray(actual, np.float64) - exact) / np.linalg.norm(exact)


def test_int4_by_formula():
    """Symmetric: amax / 7.5 in float16, half to even, -8..7 (compressed-tensors, torchao, qwix)."""
    kernel = normal(64, 3)
    kernel[32:, 1] = 0
    dense = np.asarray(leaf("int4", kernel).dense())
    for r in range(3):
        for g in (0, 32):
            w = kernel[g : g + 32, r]
            scale = np.float32(np.float16(np.abs(w).max() / np.float32(7.5)))
            exact = np.clip(np.round(w / (scale or 1)), -8, 7) * scale
            np.testing.assert_array_equal(dense[g : g + 32, r], exact)


def test_asymmetric_int4_by_formula():
    kernel = normal(32, 4) + np.array([0, 3, -3, 0.5], np.float32)
    dense = np.asarray(leaf("int4(symmetric=False)", kernel).dense())
    low, high = np.minimum(kernel.min(0), 0), np.maximum(kernel.max(0), 0)
    scale = np.float32(np.float16((high - low) / np.float32(15)))
    zero = np.clip(np.round(-low / scale), 0, 15)
    np.testing.assert_array_equal(dense, (np.clip(np.round(kernel / scale) + zero, 0, 15) - zero) * scale)


def test_int8_by_formula():
    kernel = normal(40, 5)
    scale = np.abs(kernel).max(0) / np.float32(127)
    np.testing.assert_allclose(leaf("int8", kernel).dense(), np.round(kernel / scale) * scale, rtol=1e-6)


def test_nf4_takes_the_nearest_value_of_the_table():
    kernel = normal(64, 6)
    dense = np.asarray(leaf("nf4", kernel).dense())
    amax = np.abs(kernel).max(0)
    nearest = TABLE[np.abs((kernel / amax)[..., None] - TABLE).argmin(-1)]
    np.testing.assert_array_equal(dense, nearest * amax)


def test_packing_is_two_codes_a_byte_a_half_of_the_group_apart():
    codes = np.arange(32) % 16
    values = np.asarray(leaf("int4", (codes - 8.0)[:, None].astype(np.float32) * 1).values)[0]
    scale = np.float32(np.float16(8 / 7.5))
    codes = np.clip(np.round((codes - 8) / scale), -8, 7).astype(int) + 8
    np.testing.assert_array_equal(values, codes[:16] | codes[16:] << 4)


@pytest.mark.parametrize("spec", BITS)
def test_bytes_are_the_bits_claimed(spec):
    assert resident_bytes(leaf(spec, normal(256, 8))) == 256 * 8 * BITS[spec] / 8


@pytest.mark.slow
@pytest.mark.parametrize("spec", slow_except(SPECS, "int4", "nf4"))
def test_a_leaf_stands_for_its_kernel_and_its_table(spec, width=83):
    kernel, x = normal(2, width, 5), jnp.asarray(normal(3, width))
    stacked = leaf(spec, kernel)
    assert stacked.shape == kernel.shape and relative(stacked.dense(), kernel) < 0.15
    unstacked = jax.tree.map(lambda array: array[1], stacked)
    np.testing.assert_array_equal(unstacked.dense(), stacked.dense()[1])
    assert relative(matmul(x, unstacked, "float32"), np.asarray(x) @ np.asarray(unstacked.dense())) < 3e-5
    table = quantize({"embedding": jnp.asarray(kernel[0].T)}, "float32", [("embedding", spec)])["embedding"]
    assert table.shape == (5, width)
    np.testing.assert_array_equal(table.dense(), stacked.dense()[0].T)
    np.testing.assert_array_equal(take(table, jnp.array([[4, 0]])), table.dense()[jnp.array([[4, 0]])])
    assert relative(matmul(x, table.T, "float32"), np.asarray(x) @ np.asarray(table.dense()).T) < 3e-5


@pytest.mark.parametrize("spec", slow_except(SPECS, *(spec for spec in SPECS if "symmetric" not in spec)))
def test_gradient_of_the_input(spec):
    """Of one that no native product has, and of one that it has."""
    kernel, x, dy = leaf(spec, normal(64, 6)), jnp.asarray(normal(3, 64)), jnp.asarray(normal(3, 6))
    _, pull = jax.vjp(lambda x: matmul(x, kernel, "float32"), x)
    assert relative(pull(dy)[0], np.asarray(dy) @ np.asarray(kernel.dense()).T) < 1e-5


def native_cases():
    for form in ("int4", "zero", "minimum", "int8", "int8 groups", "nf4", "bfloat16", "float16"):
        yield form, 1, 576, 32
        yield form, 16, 65, 32
        yield slow_case(form, 3, 320, 64)
        yield slow_case(form, 7, 99, 128)


def native_leaf(form, rng, width, group):
    """A leaf of 37 rows and of random bits, the smallest scales included."""
    group = max(group, 32)
    groups = -(-width // group)
    codes = rng.integers(0, 256, (37, groups * group // 2), np.uint8)
    scale = jnp.asarray(rng.random((37, groups)) ** 8, jnp.float16)
    if form in ("bfloat16", "float16"):
        return form_of(form).leaf(jnp.asarray(rng.standard_normal((37, width)) ** 5), False)
    if form.startswith("int8"):
        spec = f"int8(group={group})" if "groups" in form else "int8"
        return form_of(spec).leaf(jnp.asarray(rng.standard_normal((37, width))), False)
    if form == "nf4":
        return form_of(f"nf4(block={group})").leaf(jnp.asarray(rng.standard_normal((37, width))), False)
    zero = jnp.asarray(rng.integers(0, 16, scale.shape), jnp.uint8) if form == "zero" else None
    minimum = jnp.asarray(rng.standard_normal(scale.shape), jnp.float16) if form == "minimum" else None
    return Int4(codes, scale, zero, minimum, None, width)


@pytest.mark.skipif(not native.instruction_sets(), reason="built without a compiler")
@pytest.mark.parametrize("instructions", slow_except(native.instruction_sets(), *native.instruction_sets()[1:]))
@pytest.mark.parametrize("form, rows, width, group", list(native_cases()))
def test_native_products(instructions, form, rows, width, group):
    """Every instruction set this machine has, on odd sizes; int4 and int8 round x to 16 bits of its group."""
    rng = np.random.default_rng(width)
    kernel = native_leaf(form, rng, width, group)
    x = jnp.asarray(rng.standard_normal((rows, width)) * np.exp(3 * rng.standard_normal(width)), jnp.float32)
    if kernel.native() is None:
        assert width % 2 or width % 4  # left to XLA
        return
    (product,) = native.products(x, [kernel.native()], instructions)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel.rows(), np.float64).T
    bound = 2e-6 * np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(kernel.rows(), axis=-1)
    if kernel.name in ("int4", "int8"):  # half a step of a group's activations, times its weights
        # Of int8 a vector's bytes are a group: at most these.
        size = 64 if kernel.name == "int8" else kernel.values.shape[-1] * 2 // kernel.scale.shape[-1]
        largest_MG = jnp.max(jnp.abs(into_groups(x, size)), -1)
        sizes_RG = jnp.sum(jnp.abs(into_groups(kernel.rows(), size)), -1)
        bound += largest_MG / 32767 / 2 @ sizes_RG.T
    assert (np.abs(product - exact) <= bound).all()


@pytest.mark.skipif(not native.instruction_sets(), reason="built without a compiler")
def test_eight_bit_activations():
    kernel = leaf("int4(activations='int8')", normal(576, 64))
    x = jnp.asarray(normal(4, 576, seed=1))
    (product,) = native.products(x, [kernel.native()])
    assert kernel.x_bits == 8 and 1e-4 < relative(product, x @ kernel.dense()) < 1e-2


@pytest.mark.skipif(not native.instruction_sets(), reason="built without a compiler")
@pytest.mark.parametrize("form", ["int4", "zero", "minimum", "int8", "nf4", "bfloat16", "float16"])
def test_products_together_are_those_alone(form, width=320):
    """Of several kernels of other heights, with one call and the gradient of one input; shared out between threads."""
    rng = np.random.default_rng(0)
    leaves = [native_leaf(form, rng, width, 32) for _ in range(3)]
    leaves[1] = jax.tree.map(lambda array: jnp.concatenate([array] * 40), leaves[1])
    x = jnp.asarray(rng.standard_normal((2, 1, width)), jnp.float32)

    def alone(x):
        return [matmul(x, leaf, "float32") for leaf in leaves]

    ys, pull = jax.vjp(lambda x: matmul_together(x, leaves, "float32"), x)
    expected, pull_alone = jax.vjp(alone, x)
    for y, product_alone in zip(ys, expected, strict=True):
        np.testing.assert_array_equal(y, product_alone)
    assert relative(pull(ys)[0], np.asarray(pull_alone(expected)[0])) < 1e-6
    assert str(jax.make_jaxpr(lambda x: matmul_together(x, leaves, "float32"))(x)).count("ffi_call[") == 1


@pytest.mark.skipif(not native.instruction_sets(), reason="built without a compiler")
def test_what_does_not_multiply_together(monkeypatch):
    x, kernel, other = jnp.ones((1, 64)), leaf("int4", normal(64, 6)), leaf("int4(group=64)", normal(64, 6))

    def together(*leaves):
        return matmul_together(x, leaves, "float32")

    assert together(kernel, kernel) is not None
    assert together(kernel, other) is None  # groups of another size
    assert together(kernel, leaf("int8", normal(64, 6))) is None
    assert together(kernel, kernel.replace(x_scale=jnp.ones((1, 64)))) is None
    assert together(kernel, kernel.dense()) is None
    monkeypatch.setattr(native, "instruction_sets", tuple)
    assert together(kernel, kernel) is None


def test_the_kernel_is_chosen_and_noted(monkeypatch):
    kernel = leaf("int4", normal(64, 32))
    few, many = jnp.ones((products.FEW_ROWS, 64)), jnp.ones((products.FEW_ROWS + 1, 64))
    with kernel_choice.recording_kernels() as used:
        jax.eval_shape(lambda: matmul(many, kernel, "float32"))
        assert used.pop("matmul_int4") == {"xla"}
        jax.eval_shape(lambda: matmul(few, kernel, "float32"))
        assert used.pop("matmul_int4") == ({"ffi"} if native.instruction_sets() else {"xla"})
        with kernel_choice.compiling_for("gpu"):
            jax.eval_shape(lambda: matmul(few, kernel, "float32"))
        assert used.pop("matmul_int4") == {"pallas"}
        monkeypatch.setattr(native, "instruction_sets", tuple)
        jax.eval_shape(lambda: matmul(few, kernel, "float32"))
        assert used.pop("matmul_int4") == {"xla"}


@pytest.mark.parametrize("has_native", [True, False])
@pytest.mark.parametrize("spec", ["bfloat16", "int8", "int4", "nf4"])
def test_a_loop_keeps_the_weights_compressed(spec, has_native, monkeypatch):
    """No float32 copy of all layers is made ahead of a loop; one layer's at a time may be, without native products."""
    if not has_native:
        monkeypatch.setattr(native, "instruction_sets", tuple)
    layers = [leaf(spec, normal(128, 128, seed=i) / 12) for i in range(8)]

    def decode(layers, x):
        def step(_, x):
            for kernel in layers:
                x = jnp.tanh(matmul(x, kernel, "float32"))
            return x

        return jax.lax.fori_loop(0, 4, step, x)

    compiled = jax.jit(decode, donate_argnums=1).lower(layers, jnp.ones((1, 128))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 128 * 128 * 4
    exact = jnp.ones((1, 128))
    for kernel in layers * 4:
        exact = jnp.tanh(exact @ kernel.dense())
    assert relative(compiled(layers, jnp.ones((1, 128))), np.asarray(exact)) < 1e-3  # int4: 32 times rounded to 16 bits


@pytest.mark.parametrize("spec", ["bfloat16", "float16", "int8"])
def test_a_loop_looks_rows_up_in_a_table_as_it_lies(spec):
    """Decoding looks a token up in every step: no copy of the table is made for it."""
    table = quantize({"embedding": jnp.asarray(normal(512, 64))}, spec)["embedding"]

    def decode(table, x):
        return jax.lax.fori_loop(0, 4, lambda i, x: x + take(table, jnp.array([i]) + x[0, :1].astype(int) % 2), x)

    compiled = jax.jit(decode, donate_argnums=1).lower(table, jnp.ones((1, 64))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 64


def test_threads_share_no_state():
    """Products that XLA runs at the same time, from several threads, are what they are alone."""
    import concurrent.futures

    kernel, x = leaf("int4", normal(512, 1024)), jnp.asarray(normal(2, 512))
    run = jax.jit(lambda x, kernel: sum(matmul(x * i, kernel, "float32") for i in range(1, 9)))
    alone = run(x, kernel)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for product in pool.map(lambda _: run(x, kernel), range(24)):
            np.testing.assert_array_equal(product, alone)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("int5", "no quant of that name"),
        ("int4(group=48)", "power of two"),
        ("int4(method='gtpq')", "did you mean 'gptq'"),
        ("int4(activations='int4')", "none of float, int8"),
        ("int8(group=5)", "multiple of 32"),
        ("nf4(block=48)", "power of two"),
        ("int4(method='awq')", "text to calibrate"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        quantize({"kernel": jnp.ones((32, 4))}, spec)


@pytest.mark.parametrize(
    "spec, platform, tied",
    [("bfloat16", "cpu", 1), ("bfloat16", "gpu", 0), ("float16", "gpu", 0), ("int8", "gpu", 0), ("nf4", "gpu", 1)],
)
def test_accelerators_read_what_is_converted_and_no_more_as_it_lies(spec, platform, tied, monkeypatch):
    """Tied to the input, which keeps decompression where it is, they would be copied by a GPU's program."""
    monkeypatch.setattr(matmul_products, "instruction_sets", lambda product: ())
    kernel, x_MK = leaf(spec, normal(64, 8)), jnp.ones((products.FEW_ROWS + 1, 64), jnp.bfloat16)
    with kernel_choice.compiling_for(platform):
        made = str(jax.make_jaxpr(lambda x: products.product(x, kernel, Precision.of("bfloat16"), None))(x_MK))
    assert ("select_n" in made) == tied


@pytest.mark.parametrize("precision, tied", [("bfloat16", False), ("mixed", False), ("float32", True)])
def test_a_cpu_with_bfloat16_products_reads_kernels_as_they_lie(precision, tied, monkeypatch):
    """In both passes; in float32 they are converted, and tied."""
    monkeypatch.setattr(matmul_products, "instruction_sets", lambda product: ("avx512_bf16",))
    kernel, x_MK = leaf("bfloat16", normal(64, 8)), jnp.asarray(normal(products.FEW_ROWS + 1, 64))

    def loss(x_MK):
        return jnp.sum(products.product(x_MK, kernel, Precision.of(precision), None) ** 2)

    made = str(jax.make_jaxpr(jax.grad(loss))(x_MK))
    assert ("select_n" in made) == tied  # a jaxpr may print a function that it calls twice once
    rounded = x_MK if precision == "float32" else x_MK.astype(jnp.bfloat16)
    expected = jnp.matmul(rounded.astype(jnp.float32), kernel.dense(), precision="highest")
    actual = products.product(x_MK, kernel, Precision.of(precision), jnp.float32)
    assert relative(actual, np.asarray(expected)) < 1e-5


@pytest.mark.skipif(not native.instruction_sets(), reason="built without a compiler")
def test_a_library_of_older_sources_costs_speed_only(monkeypatch, caplog):
    monkeypatch.setattr(native, "TARGETS", (*native.TARGETS, "efficientllm_of_next_year"))
    with caplog.at_level("WARNING", "efficientllm"):
        assert native._library.__wrapped__() is None
    assert "undefined symbol: efficientllm_of_next_year" in caplog.text
