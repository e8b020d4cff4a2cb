"""Matrix products: every one of the package goes through `matmul`, under a stated precision.

Kernels are `[..., in, out]`, so that adapters, quantisers and name tables see one layout.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efficientllm.registry import build, register


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy over float32 parameters: the dtype of activations, and of both operands of a matrix product.

    Products accumulate in float32 everywhere. Softmax, norms, routers, rotary angles and the loss are float32 under
    every policy.
    """

    activation: str
    product: str


register("precision", "float32")(functools.partial(Precision, "float32", "float32"))
register("precision", "bfloat16")(functools.partial(Precision, "bfloat16", "bfloat16"))
# bfloat16 operands with float32 results in both passes: what CPUs with bfloat16 dot products run fastest, and the only
# bfloat16 product they run natively.
register("precision", "mixed")(functools.partial(Precision, "float32", "bfloat16"))


def activation_dtype(precision):
    """The dtype of activations under the policy named `precision`."""
    return jnp.dtype(build("precision", precision, where="config.model.precision").activation)


def matmul(x, w, precision, out_dtype=None):
    """`x[..., in] @ w[in, out]` -> `[..., out]` in `x.dtype` (or `out_dtype`)."""
    product = jnp.dtype(build("precision", precision, where="config.model.precision").product)
    if product != x.dtype:
        return _mixed_matmul(x, w, product).astype(out_dtype or x.dtype)
    return jnp.matmul(x, w.astype(product), preferred_element_type=out_dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixed_matmul(x, w, product):
    """A product of two operands rounded to `product`, result and gradients in float32.

    Written as a custom_vjp so that the backward products have rounded operands too: autodiff of the forward product
    would multiply the float32 cotangent with an upcast copy of the other operand.
    """
    return jnp.matmul(x.astype(product), w.astype(product), preferred_element_type=jnp.float32)


def _mixed_forward(x, w, product):
    x_low, w_low = x.astype(product), w.astype(product)
    # Zero-size arrays carry the operands' dtypes: a residual must be an array.
    return _mixed_matmul(x, w, product), (x_low, w_low, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _mixed_backward(product, residuals, dy):
    x, w, like_x, like_w = residuals
    dy = dy.astype(product)
    dx = jnp.matmul(dy, w.T, preferred_element_type=jnp.float32)
    batch = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(x, dy, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


_mixed_matmul.defvjp(_mixed_forward, _mixed_backward)
