"""Positions as a bias of the scores: ALiBi's slopes, T5's buckets, and a clipped table."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.positions.base import Bias, Position
from efficientllm.registry import register


@register("position", "alibi")
class ALiBi(Position):
    """-slope x distance, a slope a head and none of them learned (Press et al. 2021, arXiv:2108.12409, Section 3)."""

    acts_on = "scores"

    def bias(self, num_heads: int) -> Bias | None:
        slopes_H11 = jnp.asarray(alibi_slopes(num_heads), jnp.float32)[:, None, None]

        def of(mask, queries, keys):
            return -slopes_H11 * mask.distance(queries, keys)[:, None].astype(jnp.float32)

        return of


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8i/H) for head i = 1..H; where H is no power of two, every second slope of the next power follows."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]


class Table(Position):
    """A learned bias for each head and class of distances; a subclass has `classes` of them, and `class_of`."""

    acts_on = "scores"

    @nn.compact
    def bias(self, num_heads: int) -> Bias | None:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("heads", None))
        table_Hc = self.param("table", init, (num_heads, self.classes))

        def of(mask, queries, keys):
            if not mask.aligned:
                return jnp.moveaxis(table_Hc[:, self.class_of(mask.distance(queries, keys))], 0, 1)
            distance_L = jnp.arange(queries[0] - keys[1] + 1, queries[1] - keys[0])
            is_class_Lc = self.class_of(distance_L)[:, None] == jnp.arange(self.classes)
            value_HL = jnp.sum(jnp.where(is_class_Lc, table_Hc[:, None], 0.0), -1)
            return _diagonals(value_HL, keys[1] - keys[0])[None]

        return of


def _diagonals(value_HL, S):
    """`[H, T + S - 1]`, a value a diagonal -> `[H, T, S]`.

    By reshapes alone, row t of the result is the reversed values from T - 1 - t on: the gradient of a look-up of every
    pair would scatter one pair at a time.
    """
    H, L = value_HL.shape
    T = L + 1 - S
    rows_HTL = jnp.broadcast_to(value_HL[:, None, ::-1], (H, T, L))
    skewed = jnp.pad(rows_HTL, ((0, 0), (0, 0), (0, 1))).reshape(H, T * (L + 1))[:, : T * L].reshape(H, T, L)
    return skewed[:, :, T - 1 :]


@register("position", "relative")
class Relative(Table):
    """A scalar for each distance 0..max_distance, clipped there (Shaw et al. 2018, arXiv:1803.02155, Eq. 4, as the
    bias of the scores that T5 and Swin make of it)."""

    max_distance: int = 64

    @property
    def classes(self) -> int:
        return self.max_distance + 1

    def class_of(self, distance: jax.Array) -> jax.Array:
        return jnp.clip(distance, 0, self.max_distance)


@register("position", "t5")
class T5(Table):
    """Buckets that widen with distance (Raffel et al. 2019, arXiv:1910.10683, Section 2.1), causal: half of the
    `num_buckets` hold a distance each, the rest grow up to `max_distance`."""

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
        return self.num_buckets

    def class_of(self, distance: jax.Array) -> jax.Array:
        distance = jnp.maximum(distance, 0)
        exact = self.num_buckets // 2
        far = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = exact + (far * (self.num_buckets - exact)).astype(jnp.int32)
        return jnp.where(distance < exact, distance, jnp.minimum(far, self.num_buckets - 1))
