"""Rotary positions (Su et al. 2021, arXiv:2104.09864, Eq. 34), in the half-split layout of Llama and Qwen."""

import flax.linen as nn
import jax.numpy as jnp

from efficientllm.registry import register


@register("position", "rope")
class RoPE(nn.Module):
    """Turns pair i of a head by position x base^(-2i/K); `base` is the model's."""

    base: float

    def rotate(self, x_BTHK, positions_BT):
        """`[B, T, H, K]` -> the same, turned. Angles are float32: bfloat16 rounds position 257 to 256."""
        K = x_BTHK.shape[-1]
        frequency = self.base ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(x_BTHK.dtype)
