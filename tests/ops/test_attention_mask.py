"""Masks against their definition, pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ops import attention_mask
from efficientllm.ops.attention_mask import Mask

T = 23
SEGMENTS = np.repeat([[1, 2, 3, 0]], [9, 1, 10, 3], axis=1)
BLOCKS = np.repeat([[0, 1, 0, 1, 2, 0]], [2, 4, 3, 6, 5, 3], axis=1)


def may_read(order, window, t, s):
    """Whether query t reads key s, as the docstring of `Mask` says it."""
    in_block = BLOCKS[0, t] == BLOCKS[0, s] > 0
    ordered = {"causal": s <= t, "bidirectional": True, "prefix": s <= t or in_block}[order]
    return ordered and (window is None or abs(t - s) < window)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("order", ["causal", "bidirectional", "prefix"])
def test_a_mask_is_its_definition(order, window, segmented):
    segments, blocks = SEGMENTS if segmented else None, BLOCKS if order == "prefix" else None
    mask = Mask(segments_BT=segments, order=order, window=window, blocks_BT=blocks)
    same = SEGMENTS[0, :, None] == SEGMENTS[0] if segmented else np.ones((T, T), bool)
    expected = same & np.array([[may_read(order, window, t, s) for s in range(T)] for t in range(T)])
    np.testing.assert_array_equal(mask.dense(T, T)[0], expected)
    np.testing.assert_array_equal(mask.rows((5, 17), (3, 20))[0], expected[5:17, 3:20])
    of_queries = {name: x if x is None else x[:, 5:17] for name, x in mask.queries(T).items()}
    np.testing.assert_array_equal(mask.replace(**of_queries).rows((0, 12), (0, T))[0], expected[5:17])
    if order == "bidirectional" and not segmented:
        assert mask.pairs(T) == expected.sum()
    assert mask.reads_all == (order == "bidirectional" and window is None and not segmented)


def test_a_causal_row_counts_half_of_its_square():
    assert Mask().pairs(T) == T * T / 2
    assert Mask(window=4).pairs(T) == 4 * 4 / 2 + 4 * (T - 4)
    assert Mask(order="bidirectional").pairs(T, 7) == 7 * T
    assert Mask(order="bidirectional", window=50).pairs(T) == T * T


def test_cross_attention_reads_the_text_of_the_querys_segment_and_no_padding():
    queries, keys = np.array([[1, 1, 2, 2, 0]]), np.array([[1, 2, 2, 0]])
    np.testing.assert_array_equal(Mask.across(None, keys).dense(5, 4)[0], [[1, 1, 1, 0]] * 5)
    np.testing.assert_array_equal(Mask.across(queries, keys).dense(5, 4)[0], queries[0][:, None] == keys[0])
    assert Mask.across(queries, None).dense(5, 4).all() and Mask.across().reads_all
    assert not Mask.across().aligned


@pytest.mark.parametrize("window", [None, 3, 40])
def test_a_chunk_of_the_loop_reads_what_is_in_reach(window, monkeypatch):
    monkeypatch.setattr(attention_mask, "LOOP_CHUNK", 6)
    mask = Mask(order="bidirectional", window=window)
    count, size, read = mask.loop(T, T)
    assert (count - 1) * size < T <= count * size and size <= 6
    assert read == (6 + 2 * 2 if window == 3 else T)
    assert mask.executed_pairs("chunked", T) == count * size * read >= mask.pairs(T)
    assert mask.executed_pairs("xla", T) == T * T and mask.executed_pairs("gathered", T, 7) == 7 * T


def test_distances_are_of_keys_indices():
    mask = Mask(query_index_BT=jnp.array([[4, 5]]), key_index_BS=jnp.array([[3, -1, 5]]), order="bidirectional")
    np.testing.assert_array_equal(mask.distance((0, 2), (0, 3))[0], [[1, 5, -1], [2, 6, 0]])
    np.testing.assert_array_equal(mask.dense(2, 3)[0], [[True, False, True]] * 2)
