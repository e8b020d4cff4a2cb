"""Absolute positions added to the embeddings: sinusoidal and learned."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.positions.base import Position
from efficientllm.registry import register


@register("position", "sinusoidal")
class Sinusoidal(Position):
    """Sinusoidal positions (Vaswani et al. 2017, arXiv:1706.03762, Section 3.5).

    Feature 2i of position p is sin(p / wave_base^(2i/D)), feature 2i + 1 is its cosine. Embeddings are multiplied by
    sqrt(D) first, as in Section 3.4: unscaled they would be small beside waves of amplitude one.
    """

    wave_base: float = 10_000.0

    acts_on = "embedding"

    def embed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        D = x_BTD.shape[-1]
        frequency = self.wave_base ** (-jnp.arange(0, D, 2, dtype=jnp.float32) / D)
        angle = positions_BT[..., None].astype(jnp.float32) * frequency
        wave_BTD = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions_BT.shape, -1)[..., :D]
        return (x_BTD.astype(jnp.float32) * D**0.5 + wave_BTD).astype(x_BTD.dtype)


@register("position", "learned", example="learned(max_length=256)")
class Learned(Position):
    """Learned positions: a table of `max_length` embeddings (Gehring et al. 2017, arXiv:1705.03122; GPT-2)."""

    max_length: int

    acts_on = "embedding"
    max_positions = property(lambda self: self.max_length)

    @nn.compact
    def embed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        # P: max_length positions
        table_PD = self.param("table", init, (self.max_length, x_BTD.shape[-1]))
        return x_BTD + table_PD[positions_BT].astype(x_BTD.dtype)
