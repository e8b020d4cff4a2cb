"""Linear, RMSNorm and LayerNorm, with logical axis names on every parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.registry import register
from efficientllm.weights import Precision, adapted_bias, matmul, matmul_together, parameter

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Linear(nn.Module):
    """Linear map `x[..., in] -> [..., features]`.

    Attributes:
      features: the size of the output.
      axes: the logical names of the kernel's axes (in, out).
      precision: a `Precision`, or the spec of one.
      use_bias: whether a bias is added.
      out_dtype: dtype of the output; that of `x` by default.
      kernel_init: initializer of the kernel.
    """

    features: int
    axes: tuple
    precision: str | Precision
    use_bias: bool = False
    out_dtype: jnp.dtype = None
    kernel_init: nn.initializers.Initializer = fan_in_normal

    def __post_init__(self):
        self.precision = Precision.of(self.precision)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """Applies the layer to x. `y` is `x @ kernel` where `linears` has computed it already."""
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = parameter(self, "kernel", init, (x.shape[-1], self.features))
        if y is None:
            y = matmul(x, kernel, self.precision, self.out_dtype, self.axes)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[-1:])
            bias = self.param("bias", zeros, (self.features,))
            # In float32, rounded once: a bias' gradient is a sum over all rows, which is slow and coarse in 16 bits.
            y = (y + adapted_bias(kernel, bias)).astype(y.dtype)
        return y


def linears(x: jax.Array, *layers: Linear) -> list[jax.Array]:
    """Applies several Linear layers to the same x, in one fused product where the form of their kernels has one.

    The layers share a precision and have no `out_dtype`. Call it in the module that creates them.
    """
    kernels: list = [layer.get_variable("params", "kernel") for layer in layers]
    products = matmul_together(x, kernels, layers[0].precision) or [None] * len(layers)
    return [layer(x, y) for layer, y in zip(layers, products, strict=True)]


@register("norm", "rmsnorm")
class RMSNorm(nn.Module):
    """Root mean square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4), in float32.

    The normalised value is cast back before the scale multiplies it, as Llama and Qwen do.
    """

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        # The same number as a product in x.dtype, but the scale's gradient, a sum over all rows, is float32.
        return (normed.astype(x.dtype) * scale.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


@register("norm", "layernorm")
class LayerNorm(nn.Module):
    """Layer norm over the last axis (Ba et al. 2016, arXiv:1607.06450), in float32.

    With scale and bias if it is `affine`; without parameters otherwise, as where a modulation has both (DiT).
    """

    eps: float
    axis: str = "embed"
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.affine:
            return self._normalise(x).astype(x.dtype)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)), (x.shape[-1],))
        return (self._normalise(x) * scale + bias).astype(x.dtype)

    def _normalise(self, x):
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, -1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.eps)
