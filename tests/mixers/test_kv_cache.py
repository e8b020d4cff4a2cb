"""Quantized KV caches: arithmetic and bytes, logits near those of the plain cache, and refused kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contract
from efficientllm import model
from efficientllm.errors import UserError
from efficientllm.ops.int8_kv_cache import Int8KVCache, as_array

BYTES = {  # a token: of 2 KV heads of 8, keys and values; of latents of 32 and keys of 4
    "gqa(kv_cache='int8')": 2 * 2 * (8 + 4),
    "gqa(kv_cache='float16')": 2 * 2 * 8 * 2,
    "window(window=5, kv_cache='int8')": 2 * 2 * (8 + 4),
    "window(window=5, kv_cache='bfloat16')": 2 * 2 * 8 * 2,
    "mla(kv_cache='int8')": (32 + 4) + (4 + 4),
    "mla(kv_cache='float16')": (32 + 4) * 2,
}


def test_each_vector_is_rounded_by_itself():
    vectors = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
    vectors[0, 0, 0] = 0
    cache = Int8KVCache.of(jnp.asarray(vectors))
    scale = np.abs(vectors).max(-1, keepdims=True) / np.float32(127)
    exact = np.round(vectors / np.where(scale > 0, scale, 1)) * scale
    np.testing.assert_allclose(as_array(cache, jnp.float32), exact, rtol=1e-6)


@pytest.mark.parametrize("spec", BYTES)
def test_bytes_are_those_of_the_formula(spec):
    contract.check_state_bytes("mixer", spec)
    lm = contract.build("mixer", spec)
    (mixer,), _ = model.parts(lm)[0]
    assert mixer.state_bytes(1) == BYTES[spec]


def states_after(lm, pieces):
    """`(logits of all tokens, states)` of a pass a piece."""
    params = contract.parameters(lm)
    run = jax.jit(lambda t, c, s: lm.apply({"params": params}, t, c, s)[:2])
    states, pieces_of_logits, start = model.init_states(lm, contract.B, contract.T), [], 0
    for size in pieces:
        ctx = contract.Context.decoding(contract.positions()[:, start : start + size])
        logits, states = run(contract.tokens()[:, start : start + size], ctx, states)
        pieces_of_logits.append(logits)
        start += size
    return jnp.concatenate(pieces_of_logits, 1), states


@pytest.mark.slow
@pytest.mark.parametrize("spec", BYTES)
def test_logits_are_near_and_do_not_depend_on_the_pieces(spec):
    lm = contract.build("mixer", spec)
    whole, _ = states_after(lm, [contract.T])
    pieces, states = states_after(lm, [7, 9, *[1] * (contract.T - 16)])
    exact = contract.logits(lm, contract.tokens())
    # A number that float rounding moves over an edge is a step of its scale away, an eighth of what is allowed here.
    for logits in (whole, pieces):
        assert 0 < jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact) < 0.02
    assert jnp.linalg.norm(whole - pieces) / jnp.linalg.norm(exact) < 0.0025
    assert any(leaf.dtype == spec.split("'")[1] for leaf in jax.tree.leaves(states))


def test_what_has_no_such_state_is_refused():
    with pytest.raises(UserError, match="no mixer of this model"):
        contract.build("mixer", "mamba", kv_cache="int8")
    with pytest.raises(UserError, match="did you mean 'int8'"):
        contract.build("mixer", "gqa", kv_cache="int4")
    lm = contract.build("mixer", "mqa", kv_cache="int8")
    assert model.parts(lm)[0].mixers[0].kv_cache == "int8"
