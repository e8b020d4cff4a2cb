"""Relative positions as a bias of the attention scores: ALiBi, T5 buckets, clipped distances.

Letters: c classes of distances.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.ops.attention_bias import TableBias
from efficientllm.positions.base import Bias, Position
from efficientllm.registry import register

MEMO = "position_table"  # the name of a shared table in `ctx.memo`


@register("position", "alibi")
class ALiBi(Position):
    """Attention with linear biases: -slope x distance, a fixed slope a head (Press et al. 2021, arXiv:2108.12409).

    Keys after the query have the bias of keys as far before it.
    """

    acts_on = "scores"

    def bias(self, num_heads: int) -> Bias | None:
        slopes_H11 = jnp.asarray(alibi_slopes(num_heads), jnp.float32)[:, None, None]

        def of(mask, queries, keys):
            distance_BTS = mask.distance(queries, keys)
            if mask.order != "causal":
                distance_BTS = jnp.abs(distance_BTS)
            return -slopes_H11 * distance_BTS[:, None].astype(jnp.float32)

        return of


def alibi_slopes(num_heads: int) -> list[float]:
    """Computes 2^(-8i/H) for head i = 1..H.

    Where H is no power of two, the slopes of the power below come first, then every second slope of the power above.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]


class Table(Position):
    """Base class of learned biases, one for each head and class of distances.

    A subclass defines `classes`, their number, and `class_of`, the class of a distance: the query's index less the
    key's, which is negative for keys after the query.

    Args:
      shared: all layers share one table, as in T5; otherwise each layer has its own, as in UMT5.
    """

    shared: bool = False

    acts_on = "scores"

    def init_memo(self, num_heads: Sequence[int]) -> dict[str, jax.Array]:
        if not self.shared:
            return {}
        counts = sorted({*num_heads} - {0})
        if len(counts) != 1:
            raise UserError(
                f"shared = True: layers share one table, and have {counts or 'no'} heads; take shared=False"
            )
        return {MEMO: self._make_table(*counts)}

    @nn.compact
    def _make_table(self, num_heads):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("heads", None))
        return self.param("table", init, (num_heads, self.classes))

    def bias(self, num_heads: int, memo: dict[str, jax.Array] | None = None) -> Bias | None:
        table_Hc = self._make_table(num_heads) if memo is None else memo[MEMO]
        return TableBias(table_Hc, self.class_of)


@register("position", "relative")
class Relative(Table):
    """Relative bias: a scalar for each distance 0..max_distance, clipped (Shaw et al. 2018, arXiv:1803.02155, Eq. 4).

    As in T5 and Swin the scalar is a bias of the scores, not a vector added to keys. Keys after the query have the
    scalar of keys as far before it.
    """

    max_distance: int = 64

    @property
    def classes(self) -> int:
        """c, the number of classes."""
        return self.max_distance + 1

    def class_of(self, distance: jax.Array, order: str = "causal") -> jax.Array:
        """Maps distances to classes 0..c - 1."""
        return jnp.clip(distance if order == "causal" else jnp.abs(distance), 0, self.max_distance)


@register("position", "t5")
class T5(Table):
    """T5 relative bias: buckets that widen with distance (Raffel et al. 2019, arXiv:1910.10683, Section 2.1).

    Half of the `num_buckets` hold one distance each. The other half grow logarithmically up to `max_distance`. In a
    bidirectional row keys after the query have the later half of all buckets, as in T5's encoder; in the blocks of a
    `prefix` row they have the buckets of keys as far before it.
    """

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"t5: max_distance = {self.max_distance} must be above num_buckets / 2 = {self.num_buckets // 2}: that "
                "many distances have a bucket each"
            )
        super().__post_init__()

    @property
    def classes(self) -> int:
        """c, the number of classes."""
        return self.num_buckets

    def class_of(self, distance: jax.Array, order: str = "causal") -> jax.Array:
        """Maps distances to classes 0..c - 1."""
        if order != "bidirectional":
            return self._bucket(jnp.maximum(distance, 0) if order == "causal" else jnp.abs(distance), self.num_buckets)
        half = self.num_buckets // 2
        return jnp.where(distance < 0, half, 0) + self._bucket(jnp.abs(distance), half)

    def _bucket(self, distance, buckets):
        """Maps distances from 0 on to `buckets` buckets."""
        exact = buckets // 2
        far = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = exact + (far * (buckets - exact)).astype(jnp.int32)
        return jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))
