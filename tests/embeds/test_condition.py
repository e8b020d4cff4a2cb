"""Conditions of pictures: their leaves in batches, rows of two conditions mixed, and neighbours of guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.embeds.condition import LEAVES, Condition

pytestmark = pytest.mark.quick


def condition(seed=0, rows=3):
    draw = np.random.default_rng(seed)
    text, pooled = draw.normal(size=(rows, 4, 2)), draw.normal(size=(rows, 5))
    return Condition(jnp.asarray(draw.integers(0, 9, rows)), jnp.asarray(text), jnp.asarray(pooled))


def test_leaves_of_a_batch_are_read_by_name():
    whole = condition()
    batch = {name: getattr(whole, field) for name, (field, _) in LEAVES.items()}
    jax.tree.map(np.testing.assert_array_equal, Condition.of(batch | {"images": jnp.zeros(3)}), whole)
    text = Condition.of({"text": batch["text"]})
    assert text.labels_B is None and text.pooled_BE is None and text.rows == 3
    assert Condition.abstract({"labels": jax.ShapeDtypeStruct((), jnp.int32)}, 7).rows == 7


def test_rows_of_another_condition_take_the_place_of_chosen_ones():
    a, b = condition(), condition(1)
    mixed = a.where(jnp.array([False, True, False]), b)
    for rows, expected in ((slice(0, 1), a), (slice(1, 2), b), (slice(2, 3), a)):
        jax.tree.map(np.testing.assert_array_equal, mixed[rows], expected[rows])


def test_rows_of_both_are_neighbours():
    a, b = condition(), condition(1)
    pairs = a.beside(b)
    assert pairs.rows == 6
    jax.tree.map(np.testing.assert_array_equal, pairs[::2], a)
    jax.tree.map(np.testing.assert_array_equal, pairs[1::2], b)


def test_a_condition_without_rows_is_refused():
    with pytest.raises(ValueError, match="a condition of no rows"):
        Condition().rows  # noqa: B018
    with pytest.raises(ValueError, match="all of as many rows"):
        Condition(jnp.zeros(2), jnp.zeros((3, 1, 1))).rows  # noqa: B018
