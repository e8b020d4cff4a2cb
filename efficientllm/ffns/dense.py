"""Dense feed-forward networks: SwiGLU and GELU."""

import functools

import flax.linen as nn
import jax

from efficientllm.ffns.base import FFN
from efficientllm.layers import Linear, linears
from efficientllm.registry import register


@register("ffn", "swiglu")
class SwiGLU(FFN):
    """SwiGLU ffn `down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, Eq. 6)."""

    hidden: int
    precision: str

    family = "swiglu"
    has_counted_traffic = True
    recompute_elementwise = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        linear = functools.partial(Linear, self.hidden, ("embed", "mlp"), self.precision)
        gate, up = linears(x_BTD, linear(name="gate"), linear(name="up"))
        y_BTD = Linear(x_BTD.shape[-1], ("mlp", "embed"), self.precision, name="down")(jax.nn.silu(gate) * up)
        return y_BTD, {}


@register("ffn", "gelu")
class GELU(FFN):
    """GELU ffn `down(gelu(up(x)))` with the exact (erf) GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) and biases."""

    hidden: int
    precision: str
    use_bias: bool = True

    family = "gelu"
    has_counted_traffic = True
    recompute_elementwise = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        up = Linear(self.hidden, ("embed", "mlp"), self.precision, self.use_bias, name="up")(x_BTD)
        gelu = jax.nn.gelu(up, approximate=False)
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), self.precision, self.use_bias, name="down")(gelu), {}


@register("ffn", "none")
def no_ffn(parent: nn.Module | None = None, name: str | None = None) -> None:
    """Builds no ffn: the block is a mixer alone, as in Mamba."""
    return None
