"""Position bias KERPLE (Chi et al. 2022, arXiv:2205.09921): a learned slope per head over the log distance."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.positions.base import Position
from efficientllm.registry import register


@register("position", "kerple")
class Kerple(Position):
    acts_on = "scores"

    @nn.compact
    def bias(self, num_heads):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("heads",))
        slope_H = jax.nn.softplus(self.param("slope", init, (num_heads,)))
        reach_H = jax.nn.softplus(self.param("reach", init, (num_heads,)))

        def of(mask, queries, keys):
            distance_B1TS = jnp.maximum(mask.distance(queries, keys), 0)[:, None].astype(jnp.float32)
            return -slope_H[:, None, None] * jnp.log1p(reach_H[:, None, None] * distance_B1TS)

        return of
