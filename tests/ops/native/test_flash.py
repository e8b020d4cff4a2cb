"""Native attention of whole rows and its gradients against float64: orders, windows, segments and awkward sizes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm import sharding
from efficientllm.cost import jaxpr_flops
from efficientllm.errors import UserError
from efficientllm.ops.attention import Mask, attend, choose
from efficientllm.ops.native import flash, matmul
from efficientllm.plan import hlo_flops, hlo_text
from efficientllm.runtime import kernel_choice

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not flash.is_usable(), reason="no compiler, or a CPU without AVX2"),
]
SIZES = {  # B, T, S, H, G, K, V
    "one token": (1, 1, 1, 1, 1, 1, 1),
    "small": (2, 7, 7, 4, 2, 5, 3),
    "blocks": (1, 64, 64, 2, 2, 16, 16),
    "a block and a rest": (2, 130, 130, 2, 1, 24, 40),
    "wide": (1, 200, 200, 3, 1, 128, 72),
    "across": (1, 70, 33, 2, 2, 8, 8),
    "long": (1, 600, 600, 1, 1, 8, 8),
}
MASKS = {
    "causal": {"order": "causal"},
    "bidirectional": {"order": "bidirectional"},
    "causal window": {"order": "causal", "window": 20},
    "window": {"order": "bidirectional", "window": 45},
}


def make(size, dtype="float32"):
    B, T, S, H, G, K, V = SIZES[size]
    rng = np.random.default_rng(T)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V)
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def segments_of(q, kinds):
    """Documents one after another, or in any order."""
    ids = np.random.default_rng(1).integers(0, 4, q.shape[:2])
    return {"none": None, "packed": jnp.asarray(np.sort(ids)), "mixed": jnp.asarray(ids)}[kinds]


def exact(arrays, mask):
    """`(y, dq, dk, dv, bound of y)` in float64.

    A score is a sum of K products, and its error at most (K + 3) u times what was summed; weights err by twice that,
    4 x 2^-22 of the powers of two, and u for each term of their sum and of the sum of values.
    """
    q, k, v, dy = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    k, v = np.repeat(k, H // G, 2), np.repeat(v, H // G, 2)
    scale, u = K**-0.5, 2.0**-24
    scores, summed = (scale * np.einsum("bthk,bshk->bhts", f(q), f(k)) for f in (np.asarray, abs))
    masked = np.where(np.asarray(mask.dense(T, S))[:, None], scores, -np.inf)
    weights = np.exp(masked - masked.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshk->bthk", weights, v)
    dweights = np.einsum("bthk,bshk->bhts", dy, v)
    dscores = scale * weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dq, dk, dv = (
        np.einsum("bhts,bshk->bthk", dscores, k),
        np.einsum("bhts,bthk->bshk", dscores, q),
        np.einsum("bhts,bthk->bshk", weights, dy),
    )
    dk, dv = (x.reshape(*x.shape[:2], G, H // G, -1).sum(3) for x in (dk, dv))
    relative = 2 * (K + 3) * u * summed.max() + 2.0**-20 + (2 * S + 4) * u
    return y, dq, dk, dv, relative * np.einsum("bhts,bshk->bthk", weights, abs(v))


def value_and_gradients(arrays, mask, kernel):
    @jax.jit
    def compute(q, k, v, dy):
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), q, k, v)
        return y, *pull(dy)

    return compute(*arrays)


def check(arrays, mask):
    y, *gradients, bound = exact(arrays, mask)
    actual, *of_arrays = value_and_gradients(arrays, mask, "flash")
    half = arrays[0].dtype == jnp.bfloat16
    assert actual.dtype == arrays[0].dtype
    assert np.all(abs(np.asarray(actual, np.float64) - y) <= bound + (2.0**-8 * abs(y) if half else 0))
    # In bfloat16 the output that the backward pass reads, and its results, are rounded.
    tolerance = 2.0**-7 if half else 1e-5
    for gradient, expected in zip(of_arrays, gradients, strict=True):
        error = np.linalg.norm(np.asarray(gradient, np.float64) - expected)
        assert gradient.dtype == arrays[0].dtype and error <= tolerance * max(np.linalg.norm(expected), 1e-3)


@pytest.fixture(params=matmul.attention_instruction_sets())
def instructions(request, monkeypatch):
    """Each instruction set of this machine, by the flag that limits XLA."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={request.param}")
    assert matmul.attention_instruction_sets()[-1] == request.param


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("segments", ["none", "packed", "mixed"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [name for name in SIZES if name != "across"])
def test_attention_and_gradients(size, name, segments):
    arrays = make(size)
    check(arrays, Mask(segments_of(arrays[0], segments), **MASKS[name]))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("size", ["small", "a block and a rest", "wide"])
def test_bfloat16(size):
    arrays = make(size, "bfloat16")
    check(arrays, Mask(segments_of(arrays[0], "packed")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_cores_than_kv_heads(dtype, monkeypatch):
    monkeypatch.setattr(flash, "occupies", lambda heads: False)
    check(make("a block and a rest", dtype), Mask())


def test_queries_of_other_tokens_than_keys():
    check(make("across"), Mask.across())


def test_the_bound_sees_a_key_that_is_left_out():
    arrays = make("long")
    y, *_, bound = exact(arrays, Mask())
    arrays[1] = arrays[1].at[:, 300].set(-9.0)
    assert not np.all(abs(np.asarray(attend(*arrays[:3], Mask(), "flash")) - y) <= bound)


@pytest.mark.usefixtures("instructions")
def test_a_number_that_is_not_finite_reaches_what_reads_it():
    q, k, v, _ = make("blocks")
    for array in (q.at[0, 40].set(jnp.nan), q.at[0, 40].set(jnp.inf)):
        y = attend(array, k, v, Mask(), "flash")
        assert np.isnan(y[0, 40]).all() and np.isfinite(y[0, :40]).all() and np.isfinite(y[0, 41:]).all()


def test_where_it_runs():
    q, _, _, _ = make("blocks")
    assert choose(q, Mask()) == choose(q, Mask(order="bidirectional")) == choose(q, Mask.across(), keys=9) == "flash"
    assert choose(q, Mask(), bias=lambda *_: 0) != "flash" != choose(q, Mask(order="prefix", blocks_BT=q[..., 0, 0]))
    of_queries = Mask(jnp.zeros((1, 64), int), query_segments_BT=jnp.ones((1, 64), int))
    assert choose(q, of_queries) != "flash", "such a query may read no key"
    assert choose(q.astype(jnp.float16), Mask()) != "flash" != choose(q, Mask(query_index_BT=jnp.zeros((1, 64), int)))
    with kernel_choice.compiling_for("gpu"):
        assert choose(q, Mask()) != "flash"
    with jax.set_mesh(sharding.make_mesh("data=8", jax.devices())):
        assert choose(q, Mask()) != "flash"
    with pytest.raises(UserError, match="'flash': needs one CPU device with AVX2"):
        attend(q, q, q, Mask(), "flash", bias=lambda *_: 0)


def test_below_avx2_xla_computes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")
    assert choose(make("blocks")[0], Mask()) != "flash"


@pytest.mark.parametrize("name", MASKS)
def test_products_are_counted_in_jaxprs_and_programs(name):
    arrays, mask = make("a block and a rest"), Mask(**MASKS[name])
    pairs = 2 * 2 * mask.executed_pairs("flash", 130)
    expected = 2 * pairs * (4 * 24 + 3 * 40)
    assert pairs >= 2 * 2 * mask.pairs(130)
    assert jaxpr_flops.count_needed_flops(lambda *a: value_and_gradients(a, mask, "flash"), *arrays) == expected
    compiled = jax.jit(lambda *a: value_and_gradients(a, mask, "flash")).lower(*arrays).compile()
    program = hlo_text.Program(compiled.as_text())
    assert expected == sum(
        hlo_flops.product_flops(computation, instruction) or 0
        for computation in program.computations.values()
        for instruction in computation.values()
        if "efficientllm_flash" in hlo_flops.called(instruction)
    )


def test_arrays_that_do_not_fit_are_refused():
    zeros, none = jnp.zeros, jnp.zeros((0, 0), jnp.int32)
    best = matmul.attention_instruction_sets()[-1]
    attributes = {"scale": np.float32(1), "is_causal": True, "window": np.int64(0), "instructions": best}
    shapes = jax.ShapeDtypeStruct((1, 4, 2, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2, 4), jnp.float32)
    call = jax.ffi.ffi_call(flash.TARGET, shapes)
    q, k, ids = zeros((1, 4, 2, 3)), zeros((1, 4, 1, 3)), zeros((1, 4), jnp.int32)
    jax.block_until_ready(call(q, k, k, ids, ids, **attributes))
    for wrong, message in (
        ((q, zeros((1, 4, 1, 5)), k, none, none), "keys and values"),
        ((q, zeros((1, 4, 3, 3)), zeros((1, 4, 3, 3)), none, none), "keys and values"),
        ((q, k, zeros((1, 4, 1, 7)), none, none), "results"),
        ((q, zeros((1, 5, 1, 3)), zeros((1, 5, 1, 3)), none, none), "read no key"),
        ((q, k, k, ids, none), "segments"),
        ((q.astype(jnp.float16), k, k, none, none), "float32 or bfloat16"),
        ((q[0], k, k, none, none), r"no \[batch"),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call(*wrong, **attributes))
    for wrong in ("", "sse2"):
        with pytest.raises(Exception, match="no such instruction set"):
            jax.block_until_ready(call(q, k, k, none, none, **attributes | {"instructions": wrong}))
    gradients = jax.ffi.ffi_call(flash.GRADIENTS, [jax.ShapeDtypeStruct(q.shape, jnp.float32)] * 3)
    operands = (q, k, k, ids, ids, q, zeros((1, 2, 4)))
    jax.block_until_ready(gradients(*operands, q, **attributes))
    with pytest.raises(Exception, match="gradients that do not fit"):
        jax.block_until_ready(gradients(*operands, k, **attributes))
