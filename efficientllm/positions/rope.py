"""Rotary positions (Su et al. 2021, arXiv:2104.09864, Eq. 34)."""

import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.positions.base import Position
from efficientllm.registry import build, register


@register("position", "rope")
class RoPE(Position):
    """Turns pair i of a head by position x base^(-2i/K); `base` is the model's.

    Args:
      fraction: the leading share of each head that is turned; the rest passes (GPT-NeoX).
      interleaved: pairs are neighbours (2i, 2i + 1), as in the paper and DeepSeek; otherwise (i, i + K/2), as in
        Llama, Qwen and GPT-NeoX.
      scaling: how frequencies are stretched for longer contexts, a `rope_scaling` spec.
    """

    base: float
    fraction: float = 1.0
    interleaved: bool = False
    scaling: str = "none"

    acts_on = "heads"

    def rotate(self, x_BTHK, positions_BT):
        """`[B, T, H, K]` -> the same, turned. Angles are float32: bfloat16 rounds position 257 to 256."""
        K = int(x_BTHK.shape[-1] * self.fraction)
        if K % 2:
            raise UserError(f"rope turns pairs: {K} of a head's {x_BTHK.shape[-1]} features are not even")
        frequency, amplitude = self._scaling().frequencies(self.base, K, positions_BT)
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
        cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
        head = x_BTHK[..., :K].astype(jnp.float32)
        first, second = (head[..., ::2], head[..., 1::2]) if self.interleaved else jnp.split(head, 2, axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        turned = jnp.stack(turned, -1).reshape(head.shape) if self.interleaved else jnp.concatenate(turned, -1)
        return jnp.concatenate([turned.astype(x_BTHK.dtype), x_BTHK[..., K:]], -1)

    def score_scale(self):
        return self._scaling().score_scale()

    def _scaling(self):
        return build("rope_scaling", self.scaling, where="rope scaling")
