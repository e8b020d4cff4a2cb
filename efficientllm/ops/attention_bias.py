"""Bias of attention scores from a table, made in the tile of scores that it is added to.

Letters of this file: c classes of distances, L diagonals of a tile, T + S - 1 of them.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.ops.attention_mask import Mask, Range


@dataclasses.dataclass(frozen=True)
class TableBias:
    """A bias for each head and class of distances: `positions.base.Bias` of a table.

    Args:
      table: `[H, c]`, or `[B, H, c]` with a copy for each row of the batch.
      class_of: `(distances, order) -> classes 0..c - 1`; a distance is the query's index less the key's.
    """

    table: jax.Array
    class_of: typing.Callable

    def by_row(self, rows: int) -> "TableBias":
        """Returns the bias with a copy of the table for each row of the batch.

        The gradient of a tile then stays on the device that has the row. Of one table for all rows it would be summed
        over the devices pair by pair, as `[H, T, S]`, before it is summed into classes.
        """
        table_BHc = jnp.broadcast_to(self.table, (rows, *self.table.shape))
        return TableBias(sharding.constrain(table_BHc, "batch", "heads", None), self.class_of)

    def __call__(self, mask: Mask, queries: Range, keys: Range) -> jax.Array:
        """Computes `[B or 1, H, T, S]` for the queries and keys of two ranges, as in `Mask.rows`."""
        class_of = functools.partial(self.class_of, order=mask.order)
        first = mask.first_distance(queries, keys)
        if first is None:
            return jnp.moveaxis(self.table[:, class_of(mask.distance(queries, keys))], 0, 1)
        # Scores of consecutive tokens are constant along diagonals: one value for each distance, then spread to pairs.
        # A comparison in place of a table look-up has no scatter in its gradient.
        S = keys[1] - keys[0]
        distance_L = first + jnp.arange(1 - S, queries[1] - queries[0])
        is_class_Lc = class_of(distance_L)[:, None] == jnp.arange(self.table.shape[-1])
        value_HL = jnp.sum(jnp.where(is_class_Lc, self.table[..., None, :], 0.0), -1)
        scores = _diagonals(value_HL, S)
        return scores if scores.ndim == 4 else scores[None]


def _diagonals(value_HL, S):
    """Spreads one value a diagonal to all pairs, `[..., T + S - 1] -> [..., T, S]`.

    Row t of the result is the reversed values from T - 1 - t on. Reshapes compute it: the gradient of a look-up of
    every pair would scatter one pair at a time.
    """
    *H, L = value_HL.shape
    T = L + 1 - S
    rows_HTL = jnp.broadcast_to(value_HL[..., None, ::-1], (*H, T, L))
    # Rows of L + 1, read as rows of L, shift by one more place in each row.
    longer = jnp.pad(rows_HTL, ((0, 0),) * (len(H) + 1) + ((0, 1),))
    skewed = longer.reshape(*H, T * (L + 1))[..., : T * L].reshape(*H, T, L)
    return skewed[..., T - 1 :]
