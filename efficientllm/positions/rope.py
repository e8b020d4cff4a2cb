"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864, Eq. 34)."""

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.positions.base import Position
from efficientllm.registry import build, register


@register("position", "rope")
class RoPE(Position):
    """Rotary positions: pair i of a head rotates by position x base^(-2i/K).

    Args:
      base: the base of frequencies, the model's.
      fraction: the leading share of each head that is rotated; the rest is unchanged (GPT-NeoX).
      interleaved: whether pairs are (2i, 2i + 1), as in the paper and DeepSeek; otherwise they are (i, i + K/2), as in
        Llama, Qwen and GPT-NeoX.
      scaling: the scaling of frequencies for longer contexts, a `rope_scaling` spec.
    """

    base: float
    fraction: float = 1.0
    interleaved: bool = False
    scaling: str = "none"

    acts_on = "heads"

    @property
    def by_length(self) -> bool:
        return self._scaling().by_length

    @property
    def switches_at(self) -> int | None:
        return self._scaling().switches_at

    def rotate(self, x_BTHK: jax.Array, positions_BT: jax.Array, reach_B: jax.Array | None = None) -> jax.Array:
        """Rotates queries or keys `[B, T, H, K]`. Angles are float32: bfloat16 rounds position 257 to 256.

        `reach_B` is the length of each row, including the tokens of its prompt that are not read yet; None: the length
        by its positions. The rotation of a row does not depend on the length of another.
        """
        # K: the rotated features of a head
        K = int(x_BTHK.shape[-1] * self.fraction)
        if K % 2:
            raise UserError(f"rope turns pairs: {K} of a head's {x_BTHK.shape[-1]} features are not even")
        frequency, amplitude = self._frequencies(K, positions_BT, reach_B)
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
        cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
        head = x_BTHK[..., :K].astype(jnp.float32)
        first, second = (head[..., ::2], head[..., 1::2]) if self.interleaved else jnp.split(head, 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        rotated = jnp.stack(rotated, -1).reshape(head.shape) if self.interleaved else jnp.concatenate(rotated, -1)
        return jnp.concatenate([rotated.astype(x_BTHK.dtype), x_BTHK[..., K:]], -1)

    def _frequencies(self, K, positions_BT, reach_B):
        """Returns frequencies `[K / 2]`, `[B, 1, 1, K / 2]` where they depend on a row's length, and the amplitude."""
        scaling = self._scaling()
        if not scaling.by_length:
            return scaling.frequencies(self.base, K, positions_BT)
        reach_B = jnp.max(positions_BT, 1) + 1 if reach_B is None else reach_B
        _, amplitude = scaling.frequencies(self.base, K, positions_BT)
        frequency_BK = jax.vmap(lambda reach: scaling.frequencies(self.base, K, reach - 1)[0])(reach_B)
        return frequency_BK[:, None, None], amplitude

    def score_scale(self) -> float:
        return self._scaling().score_scale()

    def _scaling(self):
        return build("rope_scaling", self.scaling, where="rope scaling")
