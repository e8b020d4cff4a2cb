"""Attention in C++ against XLA's: every kind of state, instruction set and awkward size; what it is chosen for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ops import native
from efficientllm.ops.attention import Mask, attend
from efficientllm.ops.int8_kv_cache import Int8KVCache, as_array
from efficientllm.runtime import kernel_choice

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not native.instruction_sets(), reason="no compiler: no native library"),
]


def a_state(B, S, H, G, K, V, dtype, seed=0):
    """Queries, keys and values, and a mask in which rows have lengths of their own and holes."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape) * 2, jnp.float32) for shape in ((B, H, K), (B, S, G, K), (B, S, G, V))
    )
    mask = np.arange(S) < rng.integers(1, S + 1, (B, 1))
    mask &= (rng.random((B, S)) < 0.8) | (np.arange(S) == 0)
    return q, k.astype(dtype), v.astype(dtype), jnp.asarray(mask)


def check(actual, q, k, v, mask, scale):
    """Compares with attention in float64, within the bound of rounding to first order.

    u = 2^-24 is a float32's rounding. A score is a sum of K products, each rounded once more for q's factor and a scale
    of int8: its error is at most (K + 4) u sum |q k|. Weights are exponentials of scores, 2 units in the last place
    and one for the argument's own rounding; sums over slots go by units of 64 slots or more, at most 64 of them.
    """
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[2], 2) for x in (k, v))
    scores = np.where(np.asarray(mask)[:, None], np.einsum("bhk,bshk->bhs", q, k) * scale, -np.inf)
    shifted = scores - scores.max(-1, keepdims=True)
    weights = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    expected = np.einsum("bhs,bshv->bhv", weights, v)
    u, slots = 2.0**-24, k.shape[1]
    of_score = (q.shape[-1] + 4) * np.einsum("bhk,bshk->bhs", abs(q), abs(k)) * abs(scale)
    of_weight = np.where(weights > 0, of_score + np.where(weights > 0, abs(shifted), 0) + 4, 0)
    of_sums = max(64, slots // 64 + 16) + 64 + 4
    spread = abs(v.transpose(0, 2, 1, 3)) + abs(expected)[:, :, None]
    bound = u * (
        np.einsum("bhs,bhsv->bhv", weights * of_weight, spread) + of_sums * np.einsum("bhs,bhsv->bhv", weights, spread)
    )
    worst = np.max(abs(np.asarray(actual) - expected) / bound)
    assert worst <= 1, f"{worst:.2f} times the bound of rounding"


SHAPES = [(1, 641, 9, 3, 64, 64), (3, 130, 4, 4, 7, 5), (2, 128, 20, 1, 96, 33), (2, 5, 2, 2, 128, 128)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_the_sum_is_that_of_the_formula(instructions, shape, dtype):
    q, k, v, mask = a_state(*shape, dtype)
    scale = shape[4] ** -0.5
    actual = jax.jit(lambda *a: native.attention(a[0], a[1:-2], *a[-2:], scale, instructions=instructions))(
        q, k, v, mask
    )
    check(actual, q, k, v, mask, scale)
    with pytest.raises(AssertionError):  # the bound sees what a rounding to bfloat16 would do
        check(actual.astype(jnp.bfloat16), q, k, v, mask, scale)


@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_a_state_in_int8_is_read_as_it_lies(instructions):
    q, k, v, mask = a_state(2, 300, 6, 2, 40, 24, "float32")
    k, v = Int8KVCache.of(k), Int8KVCache.of(v)
    scales = k.scale[..., 0], v.scale[..., 0]
    actual = native.attention(q, [k.values], v.values, mask, 0.2, scales, instructions)
    read = as_array(k, jnp.float32), as_array(v, jnp.float32)
    check(actual, q, *read, mask, 0.2)


@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_keys_may_lie_in_two_parts(instructions):
    """As MLA's latent and the key that all heads share, whose value is the latent."""
    q, k, _, mask = a_state(2, 150, 6, 1, 48 + 10, 1, "float32")
    latent, rotated = k[..., :48], k[..., 48:]
    actual = native.attention(q, [latent, rotated], latent, mask, 0.2, instructions=instructions)
    check(actual, q, k, latent, mask, 0.2)
    latent, rotated = Int8KVCache.of(latent), Int8KVCache.of(rotated)
    scales = [operand.scale[..., 0] for operand in (latent, rotated, latent)]
    actual = native.attention(q, [latent.values, rotated.values], latent.values, mask, 0.2, scales, instructions)
    read = [as_array(leaf, jnp.float32) for leaf in (latent, rotated)]
    check(actual, q, jnp.concatenate(read, -1), read[0], mask, 0.2)


def test_large_scores_and_rows_that_may_read_nothing():
    q, k, v, mask = a_state(2, 200, 2, 1, 16, 16, "float32")
    actual = native.attention(q * 40, [k], v, mask.at[1].set(False), 1.0)
    check(actual[:1], q[:1] * 40, k[:1], v[:1], mask[:1], 1.0)
    np.testing.assert_array_equal(actual[1], 0)


def test_it_is_chosen_for_decoding_one_token_on_one_cpu_device():
    q, k, v, _ = a_state(2, 33, 4, 2, 16, 16, "float32")
    at_B1 = jnp.asarray([[7], [32]])
    with kernel_choice.recording_kernels() as used:
        single_token = attend(q[:, None], k, v, Mask(query_index_BT=at_B1, window=9))
        two = attend(jnp.repeat(q[:, None], 2, 1), k, v, Mask(query_index_BT=jnp.repeat(at_B1, 2, 1), window=9))
    assert used["attention"] == {"ffi", "xla"}
    np.testing.assert_allclose(single_token[:, 0], two[:, 0], atol=2e-6)
    with kernel_choice.compiling_for("tpu"), kernel_choice.recording_kernels() as used:
        attend(q[:, None], k, v, Mask(query_index_BT=at_B1))
    assert used["attention"] == {"xla"}


def test_it_is_refused_where_it_cannot_run():
    q, k, v, _ = a_state(1, 4, 2, 2, 8, 8, "float32")
    with pytest.raises(UserError, match="attention_kernel = 'ffi': decodes one token a row"):
        attend(jnp.repeat(q[:, None], 4, 1), k, v, Mask(), "ffi")
