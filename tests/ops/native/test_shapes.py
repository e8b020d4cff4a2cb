"""Arrays that do not fit each other: the native code says so and reads none of them. Also run under sanitizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ops import native

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not native.instruction_sets(), reason="no compiler: no native library"),
]

R, K, G = 8, 64, 2


def operands(form):
    """`{name: array}` of a product of three rows with R weights of K that fits."""
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((3, K), np.float32), "table": np.zeros(0, np.float32)}
    empty = {"scale": np.zeros((0, 0), np.float32)}
    empty |= {"minimum": np.zeros((0, 0), np.float16), "zero": np.zeros((0, 0), np.uint8)}
    if form in ("bfloat16", "float16"):
        return arrays | {"weights": rng.standard_normal((R, K)).astype(jnp.dtype(form))} | empty
    width, kind = (K, np.int8) if form == "int8" else (K // 2, np.uint8)
    arrays |= {"weights": rng.integers(0, 127, (R, width)).astype(kind)} | empty
    arrays["scale"] = rng.random((R, G)).astype(np.float16 if form == "int4" else np.float32)
    if form == "nf4":
        arrays["table"] = np.linspace(-1, 1, 16, dtype=np.float32)
    return arrays


def multiply(form, arrays, result=None, x_bits=16, instructions="best"):
    native._library()
    shape = jax.ShapeDtypeStruct(result or (arrays["x"].shape[0], arrays["weights"].shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(native.TARGETS[0], [shape])
    inputs = [arrays[name] for name in ("x", "table", "weights", "scale", "minimum", "zero")]
    index = native.FORMATS.index(form) if isinstance(form, str) else form
    attributes = {"format": np.int32(index), "x_bits": np.int32(x_bits), "instructions": instructions}
    return np.asarray(call(*map(jnp.asarray, inputs), **attributes)[0])


def f16(*shape):
    return np.ones(shape, np.float16)


def f32(*shape):
    return np.ones(shape, np.float32)


def u8(*shape):
    return np.ones(shape, np.uint8)


WRONG = [
    *[("int4", {"scale": f16(*shape)}) for shape in [(1, G), (R, 0), (0, G), (R - 1, G), (R + 1, G), (R, 3), (R, 64)]],
    *[("int4", {"scale": f16(*shape)}) for shape in [(R * G,), (1, R, G), (), (G, R)]],
    *[("int4", {"minimum": f16(*shape)}) for shape in [(1, 1), (R, 1), (1, G), (R, G + 1), (R * G,)]],
    *[("int4", {"zero": u8(*shape)}) for shape in [(1, 1), (R, 1), (1, G), (R, G + 1), (R * G,)]],
    *[("int4", {"weights": u8(*shape)}) for shape in [(R, 8), (R, 0), (R, 33), (R, 4, 8), (R * 32,), (R, 30)]],
    ("int4", {"scale": f32(R, G)}),
    ("int4", {"weights": np.ones((R, 32), np.int8)}),
    *[("int8", {"scale": f32(*shape)}) for shape in [(1, G), (R, 0), (R, 1, 1), (R, 3), (R, 32)]],
    *[("int8", {"weights": np.ones(shape, np.int8)}) for shape in [(R, K - 4), (R, K + 1), (R, 0)]],
    ("int8", {"scale": f16(R, G)}),
    ("int8", {"zero": u8(R, G)}),
    *[("nf4", {"scale": f32(*shape)}) for shape in [(1, G), (R, 0)]],
    *[("nf4", {"table": f32(size)}) for size in (0, 1, 15, 17)],
    *[("bfloat16", {"weights": np.ones(shape, jnp.bfloat16)}) for shape in [(R, K - 2), (R, 0), (R, K + 1), (R,)]],
    ("bfloat16", {"weights": f16(R, K)}),
    ("bfloat16", {"scale": f32(R, 1)}),
    ("float16", {"weights": np.ones((R, K), jnp.bfloat16)}),
    ("int4", {"x": f32(3, K + 1)}),
    ("int4", {"x": f32(3 * K)}),
    (5, {}),
    (-1, {}),
]


@pytest.mark.parametrize("form, changes", WRONG, ids=lambda value: str(value)[:40])
def test_a_product_that_does_not_fit_is_refused(form, changes):
    arrays = operands(form if isinstance(form, str) else "int4") | changes
    result = (arrays["x"].shape[0], arrays["weights"].shape[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="efficientllm products|no such format|x that is no rows|type"):
        multiply(form, arrays, result)


@pytest.mark.parametrize("result", [(3, R - 1), (2, R), (3, R + 1), (3 * R,), (4, R), (3, 1)])
def test_a_result_that_does_not_fit_is_refused(result):
    with pytest.raises(jax.errors.JaxRuntimeError, match="a result that is not as large"):
        multiply("int4", operands("int4"), result)


def test_other_bits_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="8 or 16 bits"):
        multiply("int4", operands("int4"), x_bits=7)


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("form", native.FORMATS)
def test_products_of_nothing_are_nothing(form, instructions):
    """No rows of x, none of weights; and what fits is multiplied."""
    arrays = operands(form)
    assert multiply(form, arrays | {"x": f32(0, K)}, instructions=instructions).shape == (0, R)
    none = {name: arrays[name][:0] for name in ("weights", "scale")}
    assert multiply(form, arrays | none, instructions=instructions).shape == (3, 0)
    narrow = multiply(form, arrays | {"x": arrays["x"][:, :0]}, instructions=instructions)
    np.testing.assert_array_equal(narrow, np.zeros((3, R)))
    assert np.abs(multiply(form, arrays, instructions=instructions)).sum() > 0


B, S, H, HEADS, WIDTH = 2, 5, 4, 2, 8


def state(kind="float32"):
    """`{name: array}` of an attention that fits."""
    cached = np.ones((B, S, HEADS, WIDTH), kind)
    scale = np.ones((B, S, HEADS) if kind == "int8" else (0, 0, 0), np.float32)
    arrays = {"q": f32(B, H, WIDTH), "k": cached, "more": cached[..., :0], "v": cached}
    return arrays | {"k_scale": scale, "more_scale": scale, "v_scale": scale, "mask": np.ones((B, S), bool)}


def attend(arrays, result=None, instructions="best"):
    native._library()
    names = ("q", "k", "more", "v", "k_scale", "more_scale", "v_scale", "mask")
    shape = jax.ShapeDtypeStruct(result or (*arrays["q"].shape[:2], arrays["v"].shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(native.TARGETS[1], shape)
    attributes = {"scale": np.float32(1), "instructions": instructions}
    return np.asarray(call(*(jnp.asarray(arrays[name]) for name in names), **attributes))


UNFIT = [
    *[
        {"q": f32(*shape)}
        for shape in [(B, H, WIDTH + 1), (B, H, WIDTH - 1), (B + 1, H, WIDTH), (B, 3, WIDTH), (B, 64)]
    ],
    *[{"k": f32(*shape)} for shape in [(1, S, HEADS, WIDTH), (B, 3, HEADS, WIDTH), (B, S, 1, WIDTH), (B, S, 0, WIDTH)]],
    *[{"v": f32(*shape)} for shape in [(1, S, HEADS, WIDTH), (B, 3, HEADS, WIDTH), (B, S, 1, WIDTH), (B, S, 16)]],
    *[{"more": f32(*shape)} for shape in [(1, S, HEADS, 0), (B, S, HEADS, 3), (B, S, 1, 0), (0,)]],
    *[{"mask": np.ones(shape, bool)} for shape in [(1, S), (B, 1), (B, S + 1), (B * S,), ()]],
    {"v": np.ones((B, S, HEADS, WIDTH), np.float16)},
    {"k": np.ones((B, S, HEADS, WIDTH), np.int32)},
]


@pytest.mark.parametrize("changes", UNFIT, ids=lambda changes: str({k: v.shape for k, v in changes.items()}))
def test_an_attention_that_does_not_fit_is_refused(changes):
    with pytest.raises(jax.errors.JaxRuntimeError, match="efficientllm attention|several types|no such element"):
        attend(state() | changes, (B, H, WIDTH))


@pytest.mark.parametrize("name", ["k_scale", "more_scale", "v_scale"])
@pytest.mark.parametrize("shape", [(0, 0, 0), (1, 1, 1), (B, S, 1), (B, S), (B, S, HEADS + 1)])
def test_scales_that_do_not_fit_are_refused(name, shape):
    with pytest.raises(jax.errors.JaxRuntimeError, match="scales that are not one a slot and head"):
        attend(state("int8") | {name: f32(*shape)})


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_attention_over_nothing_is_zero(kind, instructions):
    """No slots, no rows, no heads, no width of values."""
    arrays = state(jnp.dtype(kind))
    slots = {name: array[:, :0] for name, array in arrays.items() if name != "q"}
    if kind != "int8":
        slots |= {name: arrays[name] for name in ("k_scale", "more_scale", "v_scale")}
    np.testing.assert_array_equal(attend(arrays | slots, instructions=instructions), np.zeros((B, H, WIDTH)))
    assert attend({name: array[:0] for name, array in arrays.items()}, instructions=instructions).shape == (0, H, WIDTH)
    assert attend(arrays | {"q": arrays["q"][:, :0]}, instructions=instructions).shape == (B, 0, WIDTH)
    assert attend(arrays | {"v": arrays["v"][..., :0]}, instructions=instructions).shape == (B, H, 0)
    np.testing.assert_allclose(attend(arrays, instructions=instructions), np.ones((B, H, WIDTH)), rtol=1e-5)
