"""Squared ReLU (So et al. 2021, arXiv:2109.08668, Section 4): `down(relu(up(x))^2)`."""

import flax.linen as nn
import jax

from efficientllm.ffns.base import FFN
from efficientllm.layers import Linear
from efficientllm.registry import register


@register("ffn", "relu2")
class SquaredReLU(FFN):
    hidden: int
    precision: str

    @nn.compact
    def __call__(self, x_BTD):
        up_BTF = Linear(self.hidden, ("embed", "mlp"), self.precision, name="up")(x_BTD)
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), self.precision, name="down")(jax.nn.relu(up_BTF) ** 2), {}
