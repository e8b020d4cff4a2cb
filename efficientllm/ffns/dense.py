"""Dense feed-forward networks: SwiGLU, GEGLU and GELU."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.ffns.base import FFN
from efficientllm.layers import Linear, linears
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice


class Activation(typing.NamedTuple):
    """Activation of a hidden layer: `function(up(x))`, or where it is gated `function(gate(x)) * up(x)`."""

    function: typing.Callable[[jax.Array], jax.Array]
    is_gated: bool = False


def quick_gelu(x: jax.Array) -> jax.Array:
    """Computes `x * sigmoid(1.702 x)` (Hendrycks & Gimpel 2016, arXiv:1606.08415, Section 2), as CLIP does."""
    return x * jax.nn.sigmoid(1.702 * x)


Function = typing.Callable[[jax.Array], jax.Array]
GELUS: dict[str, Function] = {
    "erf": functools.partial(jax.nn.gelu, approximate=False),
    "tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick": quick_gelu,
}
ACTIVATIONS = {
    "swiglu": Activation(jax.nn.silu, is_gated=True),
    "gelu_erf": Activation(GELUS["erf"]),
    "gelu_tanh": Activation(GELUS["tanh"]),
    "gelu_quick": Activation(GELUS["quick"]),
    "geglu_erf": Activation(GELUS["erf"], is_gated=True),
    "geglu_tanh": Activation(GELUS["tanh"], is_gated=True),
}


class Dense(FFN):
    """Base class of dense networks `down(function(up(x)))`, or `down(function(gate(x)) * up(x))` with a gate."""

    hidden: int
    precision: str
    use_bias: bool = False

    has_counted_traffic = True
    recompute_elementwise = True
    saves_products = True

    @property
    def activation(self) -> Activation:
        """The activation of the hidden layer."""
        raise TypeError(f"{type(self).__name__} defines no activation")

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        linear = functools.partial(Linear, self.hidden, ("embed", "mlp"), self.precision, self.use_bias)
        function = self.activation.function
        if self.activation.is_gated:
            gate, up = linears(x_BTD, linear(name="gate"), linear(name="up"))
            hidden = _rounded_once(lambda gate, up: function(gate) * up, gate, up)
        else:
            hidden = _rounded_once(function, linear(name="up")(x_BTD))
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), self.precision, self.use_bias, name="down")(hidden), {}


def _rounded_once(function, *arrays):
    """Computes an elementwise function; on CPUs in float32, rounded once.

    XLA for CPUs computes it in float32 anyway, and rounds after each operation: GELU's gradient took 1.6 times as long.
    """
    if kernel_choice.platform() != "cpu":
        return function(*arrays)
    return function(*(array.astype(jnp.float32) for array in arrays)).astype(arrays[0].dtype)


@register("ffn", "swiglu")
class SwiGLU(Dense):
    """SwiGLU ffn `down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, Eq. 6)."""

    family = "swiglu"

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS["swiglu"]


@register("ffn", "geglu", choices={"kind": ("erf", "tanh")})
class GEGLU(Dense):
    """GEGLU ffn `down(gelu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, Eq. 6); T5 v1.1 has the kind `tanh`."""

    kind: str = "erf"

    family = "geglu"

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[f"geglu_{self.kind}"]


@register("ffn", "gelu", choices={"kind": tuple(GELUS)})
class GELU(Dense):
    """GELU ffn `down(gelu(up(x)))` (Hendrycks & Gimpel 2016, arXiv:1606.08415), with biases by default.

    Args:
      kind: `erf`, the exact one; `tanh`, the approximation of GPT-2, DiT, SD3 and Wan; `quick`, the sigmoid of CLIP.
    """

    use_bias: bool = True
    kind: str = "erf"

    family = "gelu"

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[f"gelu_{self.kind}"]


class Network(Dense):
    """Dense network with an activation of `ACTIVATIONS` by name, such as the shared expert of a mixture."""

    of: str = "swiglu"

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.of]


@register("ffn", "none")
def no_ffn(parent: nn.Module | None = None, name: str | None = None) -> None:
    """Builds no ffn: the block is a mixer alone, as in Mamba."""
    return None
