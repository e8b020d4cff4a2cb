"""Attention kernels against NumPy, for every order of the mask, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.ops import attention_kernels, attention_mask
from efficientllm.ops.attention import Mask, attend, choose
from efficientllm.ops.attention_bias import TableBias
from efficientllm.ops.dot_product_attention import dot_product_attention
from efficientllm.ops.native import flash
from efficientllm.plan import hlo_cost
from efficientllm.plan.hlo_text import Program
from efficientllm.positions.bias import T5, Relative
from efficientllm.runtime import kernel_choice
from tiers import slow_case, slow_except

B, H, G, K = 2, 4, 2, 8


def operands(queries, keys):
    rng = np.random.default_rng(queries)
    shapes = (B, queries, H, K), (B, keys, G, K), (B, keys, G, K)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def random_ids(length, most, seed=0):
    return np.sort(np.random.default_rng(seed).integers(0, most + 1, (B, length)), axis=1)


def by_numpy(q, k, v, mask_BTS):
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, H // G, 2)) / np.sqrt(K)
    scores = np.where(mask_BTS[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), np.repeat(v, H // G, 2))


@pytest.mark.parametrize("kernel", ["xla", slow_case("chunked"), "gathered", "looped"])
@pytest.mark.parametrize("length", [slow_case(1), slow_case(63), slow_case(64), 130])
def test_attention_kernels_against_plain_numpy(kernel, length, monkeypatch):
    monkeypatch.setattr(attention_kernels, "GATHERED_CHUNK", 8)
    monkeypatch.setattr(attention_mask, "LOOP_CHUNK", 16)
    segments = random_ids(length, 3)
    visible = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    q, k, v = operands(length, length)
    outputs = attend(q, k, v, Mask(segments_BT=jnp.asarray(segments)), kernel)
    np.testing.assert_allclose(outputs, by_numpy(q, k, v, visible), atol=2e-6)


def masks():
    """`{name: (mask, T, S)}` of every order, with and without a window, packed and across."""
    packed, blocks = jnp.asarray(random_ids(130, 3)), jnp.asarray(random_ids(130, 4, seed=1))
    text = jnp.asarray((random_ids(20, 3, seed=2) > 0).astype(np.int32))
    return {
        "bidirectional": (Mask(packed, order="bidirectional"), 130, 130),
        "alone": (Mask(order="bidirectional"), 130, 130),
        "window": (Mask(packed, order="bidirectional", window=9), 130, 130),
        "prefix": (Mask(packed, order="prefix", blocks_BT=blocks), 130, 130),
        "prefix, window": (Mask(order="prefix", blocks_BT=blocks, window=9), 130, 130),
        "across": (Mask.across(None, text), 130, 20),
        "across segments": (Mask.across(packed, jnp.asarray(random_ids(20, 3, seed=3))), 130, 20),
    }


def value_and_gradients(kernel, arrays, mask):
    weights = np.random.default_rng(0).normal(size=arrays[0].shape).astype(np.float32)

    def loss(*arrays):
        return jnp.sum(attend(*arrays, mask, kernel) * weights)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays)


def close(a, b, atol=3e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(masks(), "window", "prefix", "across segments"))
def test_kernels_honour_the_order(name, monkeypatch):
    monkeypatch.setattr(attention_mask, "LOOP_CHUNK", 32)
    monkeypatch.setattr(attention_kernels, "GATHERED_CHUNK", 16)
    mask, T, S = masks()[name]
    arrays, dense = operands(T, S), np.broadcast_to(mask.dense(T, S), (B, T, S))
    outputs = attend(*arrays, mask, "xla")
    reads = dense.any(-1)  # a query that reads no key has no softmax
    expected = by_numpy(*arrays, dense | ~reads[..., None])
    np.testing.assert_allclose(np.where(reads[..., None, None], outputs - expected, 0), 0, atol=2e-6)
    close(attend(*arrays, mask, "gathered"), outputs)
    close(value_and_gradients("chunked", arrays, mask), value_and_gradients("xla", arrays, mask))


@pytest.mark.parametrize("name", ["bidirectional", slow_case("prefix, window"), "across segments"])
def test_sharded_rows_give_what_whole_rows_give(name):
    mask, T, S = masks()[name]
    T -= 2  # 32 tokens on each of four devices

    def cut(x):
        return None if x is None else x[:, :T]

    mask = mask.replace(query_segments_BT=cut(mask.query_segments_BT), blocks_BT=cut(mask.blocks_BT))
    mask, S = (mask, S) if mask.cross else (mask.replace(segments_BT=cut(mask.segments_BT)), T)
    arrays = operands(T, S)
    expected = value_and_gradients("xla", arrays, mask)
    with jax.set_mesh(sharding.make_mesh("data=2, sequence=4")):
        assert choose(arrays[0], mask, keys=S) == "gathered"
        close(value_and_gradients("auto", arrays, mask), expected)


@pytest.mark.parametrize("window", [None, slow_case(600)])
def test_long_rows_of_both_directions_never_hold_the_scores_of_all_pairs(window, monkeypatch):
    monkeypatch.setattr(flash, "is_usable", lambda: False)
    mask = Mask(order="bidirectional", window=window)

    def temporary_bytes(T, kernel):
        q = jax.ShapeDtypeStruct((1, T, 8, 8), jnp.float32)
        gradients = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, mask, kernel) ** 2), (0, 1, 2))
        return jax.jit(gradients).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048, "auto") < 2.2 * temporary_bytes(1024, "auto")
    assert temporary_bytes(2048, "auto") < temporary_bytes(2048, "xla") / 3
    short, long = (jax.ShapeDtypeStruct((1, T, 8, 8), jnp.float32) for T in (1023, 1024))
    assert choose(short, mask) == "xla" and choose(long, mask) == choose(short, Mask.across(), keys=2048) == "chunked"


@pytest.mark.parametrize("kernel", ["looped", "gathered"])
@pytest.mark.parametrize("order, window", [("causal", None), ("causal", 9), ("bidirectional", None)])
@pytest.mark.parametrize("position", [Relative(max_distance=20), T5()], ids=["relative", "t5"])
def test_a_bias_made_in_a_tile_is_that_of_all_pairs(position, order, window, kernel, monkeypatch):
    """Outputs, and gradients of queries, keys, values and the table."""
    monkeypatch.setattr(attention_mask, "LOOP_CHUNK", 16)
    monkeypatch.setattr(attention_kernels, "GATHERED_CHUNK", 16)
    mask = Mask(jnp.asarray(random_ids(130, 3)), order=order, window=window)
    table_Hc = np.random.default_rng(0).normal(size=(H, position.classes)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(B, 130, H, K)).astype(np.float32)

    def value_and_gradients(kernel):
        def loss(table_Hc, *arrays):
            return jnp.sum(attend(*arrays, mask, kernel, TableBias(table_Hc, position.class_of)) * weights)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(table_Hc, *operands(130, 130))

    close(value_and_gradients(kernel), value_and_gradients("xla"))


def test_a_bias_of_long_rows_is_never_one_of_all_pairs():
    """The kernel is chosen by itself, and its memory grows with the tokens, not with their square."""
    bias = Relative().class_of

    def temporary_bytes(T, kernel):
        q, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, 8, 8), (8, 65)))
        gradients = jax.grad(
            lambda table, *qkv: jnp.sum(attend(*qkv, Mask(), kernel, TableBias(table, bias)) ** 2), (0, 1, 2, 3)
        )
        return jax.jit(gradients).lower(table, q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048, "auto") < 2.2 * temporary_bytes(1024, "auto")
    assert temporary_bytes(2048, "auto") < temporary_bytes(2048, "xla") / 3
    q = jax.ShapeDtypeStruct((1, 1024, 8, 8), jnp.float32)
    assert choose(q, Mask(), TableBias(None, bias)) == "looped"


def test_the_gradient_of_a_table_is_summed_over_devices_as_a_table():
    """No collective of a sharded batch is larger than a table of each row."""
    mesh = sharding.make_mesh("data=8")
    T, rows = 1024, NamedSharding(mesh, PartitionSpec("data"))
    q = jax.ShapeDtypeStruct((8, T, 2, 8), jnp.float32, sharding=rows)
    table = jax.ShapeDtypeStruct((2, 65), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(table, *qkv):
        return jnp.sum(attend(*qkv, Mask(), "auto", TableBias(table, Relative().class_of)) ** 2)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, q, q, q).compile()
    sent = [collective.bytes for collective in hlo_cost.collectives(Program(program.as_text()), 8)]
    assert sent and max(sent) <= 8 * 2 * 65 * 4


def test_gradients_of_bfloat16_keys_are_summed_in_float32(monkeypatch):
    """In bfloat16 a sum over many chunks would lose the small ones."""
    monkeypatch.setattr(attention_mask, "LOOP_CHUNK", 1)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in operands(130, 130)]
    mask = Mask(order="bidirectional")
    whole, looped = (value_and_gradients(kernel, arrays, mask)[1][2] for kernel in ("xla", "chunked"))
    error = jnp.linalg.norm((whole - looped).astype(jnp.float32)) / jnp.linalg.norm(whole.astype(jnp.float32))
    assert error < 2**-8, error


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("width", [K, slow_case(3)])
def test_products_by_kv_head_are_attention(width, dtype, tolerance):
    """Values and gradients, with a bias, a mask of each row and values of another width than keys."""
    T, S = 7, 11
    q, k, _ = operands(T, S)
    random = np.random.default_rng(1)
    v, bias = random.normal(size=(B, S, G, width)), random.normal(size=(1, H, T, S)).astype(np.float32)
    mask, weights = random.random((B, 1, T, S)) < 0.7, random.normal(size=(B, T, H, width))
    mask[..., 0] = True

    def loss(q, k, v, by_kv_head):
        y = dot_product_attention(q, k, v, jnp.asarray(bias), jnp.asarray(mask), 0.3, by_kv_head)
        return jnp.sum(y.astype(jnp.float32) * weights), y

    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    exact = [x.astype(jnp.float32) for x in arrays]
    gradients = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    for actual, expected in zip(
        *map(jax.tree.leaves, (gradients(*arrays, True), gradients(*exact, False))), strict=True
    ):
        assert actual.dtype == dtype
        assert jnp.linalg.norm(actual.astype(jnp.float32) - expected) <= tolerance * jnp.linalg.norm(expected)


def test_kernels_that_do_not_honour_an_order_say_so():
    q, blocks = jnp.zeros((1, 128, 2, 8)), jnp.ones((1, 128), jnp.int32)
    mask = Mask(order="prefix", blocks_BT=blocks)
    with pytest.raises(UserError, match="'splash': needs .*causal or bidirectional"):
        attend(q, q, q, mask, "splash")
    with pytest.raises(UserError, match="'ffi': decodes one token"):
        attend(q, q, q, Mask.across(), "ffi")
    with kernel_choice.compiling_for("tpu"):
        assert choose(q, mask) == "xla"


def test_one_query_over_a_text_is_no_decoding():
    """The kernel of decoding has no gradient."""
    arrays = operands(1, 20)
    mask = Mask.across(None, jnp.asarray(random_ids(20, 1)))
    assert choose(arrays[0], mask, keys=20) == "xla"
    value_and_gradients("auto", arrays, mask)
