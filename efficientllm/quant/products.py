"""The product of activations with compressed rows, and which kernel it runs on."""

import functools

import jax
import jax.numpy as jnp

from efficientllm import kernels, native, sharding
from efficientllm.registry import build

# Rows of x up to which the native product is taken: above, decompressing once and multiplying is faster. Measured by
# experiments/quantization/products.py.
FEW = 16


def product(x, leaf, precision, out_dtype):
    """`x[..., K] @ rows[R, K].T` -> `[..., R]`; the gradient of the leaf is zero."""
    operand = jnp.dtype(build("precision", precision, where="config.model.precision").product)
    y_MR = _product(x.reshape(-1, x.shape[-1]), leaf, operand)
    return y_MR.reshape(*x.shape[:-1], -1).astype(out_dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_MK, leaf, operand):
    if is_native(x_MK.shape[0]) and (y_MR := leaf.native(x_MK)) is not None:
        kernels.note(f"matmul_{leaf.name}", "ffi")
        return y_MR
    if is_tiled(leaf) and (y_MR := _tiled(x_MK, leaf, operand)) is not None:
        kernels.note(f"matmul_{leaf.name}", "pallas")
        return y_MR
    kernels.note(f"matmul_{leaf.name}", "xla")
    return _contract(x_MK.astype(operand), leaf.after(x_MK).rows().astype(operand), 1)


def is_native(rows):
    """Whether a product of `rows` vectors is one for `efficientllm.native`: few, and on one CPU device."""
    return rows <= FEW and native.is_usable()


def is_tiled(leaf):
    """Whether a product with `leaf`, a Weight or an array, is one for `tiled`: of int4, on one NVIDIA or TPU device."""
    return getattr(leaf, "name", None) == "int4" and sharding.is_alone() and kernels.platform() in ("gpu", "tpu")


def _tiled(x_MK, leaf, operand):
    from efficientllm.quant import tiled  # Pallas takes a second to import

    return tiled.product(x_MK, leaf, operand, kernels.platform())


def _contract(x, rows, axis):
    return jax.lax.dot_general(x, rows, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(x_MK, leaf, operand):
    return _product(x_MK, leaf, operand), (leaf, jnp.zeros(0, x_MK.dtype))


def _backward(operand, residuals, dy_MR):
    # Decompressed again: kept, all layers' rows would lie in memory at once.
    leaf, like_x = residuals
    return _contract(dy_MR.astype(operand), leaf.after(dy_MR).rows().astype(operand), 0).astype(like_x.dtype), None


_product.defvjp(_forward, _backward)
