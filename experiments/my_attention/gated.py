"""Gated attention (Qiu et al. 2025, arXiv:2505.06708, G1): a sigmoid of the input multiplies each head's output."""

import jax

from efficientllm.layers import Linear
from efficientllm.mixers.attention import GQA
from efficientllm.registry import register


@register("mixer", "gated")
class Gated(GQA, kw_only=True):
    def combine(self, y_BTHK, x_BTD):
        linear = Linear(self.num_heads * self.head_dim, ("embed", "heads"), self.precision, name="gate")
        return super().combine(y_BTHK * jax.nn.sigmoid(linear(x_BTD)).reshape(y_BTHK.shape), x_BTD)
