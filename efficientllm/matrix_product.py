"""Matrix product of activations and a kernel, `x[..., in] @ w[in, out]`, in both passes.

XLA multiplies; gradients of kernels, whose operand is transposed, are native products where the CPU has instructions.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from efficientllm import sharding
from efficientllm.registry import lookup
from efficientllm.runtime import cpuinfo, kernel_choice


def multiply(x: jax.Array, w: jax.Array, operand: jnp.dtype, result: jnp.dtype, transposed: bool = False) -> jax.Array:
    """Multiplies operands rounded to the dtype `operand` -> `[..., out]` in the dtype `result`; sums are float32.

    With `transposed`, w is `[out, in]`.
    """
    on_cpu = kernel_choice.platform() == "cpu"
    if on_cpu and operand == x.dtype == jnp.float32:
        return _product(x, w, operand, result, transposed)
    w = w.T if transposed else w
    # XLA for CPUs multiplies bfloat16 into float32 natively, and with jax 0.10.2 into bfloat16 in float32.
    if on_cpu or operand != x.dtype:
        return _product(x, w, operand, jnp.dtype(jnp.float32)).astype(result)
    return jnp.matmul(x, _rounded(w, operand), preferred_element_type=result)


ROUNDED_KERNEL = "rounded_kernel"  # the name of a kernel in the products' dtype, where it has another


def _rounded(w, operand):
    """Rounds a kernel; named on GPUs, so that a policy can save it and the backward pass need not round it again."""
    if kernel_choice.platform() != "gpu" or w.dtype == operand:
        return w.astype(operand)
    return checkpoint_name(w.astype(operand), ROUNDED_KERNEL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, w, operand, result, transposed=False):
    """Multiplies operands rounded to `operand`, accumulated to `result`, in the forward and the backward pass.

    Autodiff of a mixed product would multiply the float32 cotangent with an upcast copy of the other operand. With
    `transposed`, w is `[out, in]`.
    """
    w = w.astype(operand)
    return _matmul(x.astype(operand), w.T if transposed else w, result)


def _matmul(a, b, result):
    """Multiplies in the operands' dtype; bfloat16 in float32, to the same sums, where a CPU has no instructions for it.

    A LoRA step of SmolLM2 takes 7.7 s so, and 9.3 s by XLA's own way (AMD EPYC, Zen 3, one core, 2026-12-01).
    """
    on_cpu = kernel_choice.platform() == "cpu"
    if on_cpu and a.dtype == jnp.bfloat16 and not _has_bfloat16(cpuinfo.FILE, os.environ.get("XLA_FLAGS")):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.matmul(a, b, preferred_element_type=result)


@functools.cache  # each product that is traced asks, and the answer is read from a file
def _has_bfloat16(file, xla_flags):
    return bool(cpuinfo.bfloat16_instructions())


def _product_forward(x, w, operand, result, transposed):
    low = x.astype(operand), w.astype(operand)
    # Zero-size arrays carry the operands' dtypes: a residual must be an array.
    return _product(*low, operand, result, transposed), (*low, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _product_backward(operand, result, transposed, residuals, dy):
    x, w, like_x, like_w = residuals
    dy = dy.astype(operand)
    dx = _matmul(dy, w if transposed else w.T, result)
    if x.ndim > 2 and sharding.count_shards("length", x.shape[1]) > 1:
        # Rows and tokens are sharded over different mesh axes: a reshape to one dimension would all-gather them first.
        leading = tuple(range(x.ndim - 1))
        pair = (dy, x) if transposed else (x, dy)
        dw = jax.lax.dot_general(*pair, ((leading, leading), ((), ())), preferred_element_type=result)
    else:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        native = lookup("matmul_kernel", "native")
        if _is_worth_a_call(len(x), w.shape, operand) and native.is_usable(operand):
            dw = native.multiply(*((dy, x) if transposed else (x, dy)), operand, result, transpose_a=True)
            return dx.astype(like_x.dtype), dw.astype(like_w.dtype)
        dw = _matmul(dy.T, x, result) if transposed else _weight_gradient(x, dy, result)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


# Multiply-adds below which a call and its threads take longer than XLA's product. Medians of 15, XLA's time over the
# native one's: float32 0.7 to 0.8 from 2**16 to 2**19, 1.3 at 2**20; bfloat16 0.8 at 2**16, 1.2 to 1.7 from 2**18 on
# (an Intel Xeon with AMX, 2 cores, 2026-12-01).
LEAST_NATIVE = {"float32": 2**20, "bfloat16": 2**18}


def _is_worth_a_call(rows, kernel, operand):
    """Whether a kernel's gradient is worth a native call. A panel has 32 rows: a kernel of an adapter's rank, or a few
    rows, would be zeros mostly."""
    work = rows * math.prod(kernel)
    return rows >= 16 and min(kernel) >= 32 and work >= LEAST_NATIVE.get(jnp.dtype(operand).name, 0)


def _weight_gradient(x, dy, result):
    """Computes `x.T @ dy`, on CPUs with a separate transpose: XLA there multiplies a transposed operand at 0.6x to
    0.9x of the speed, fuses slow strided copies with its producer, and refuses bfloat16."""
    if kernel_choice.platform() != "cpu":
        return jnp.matmul(x.T, dy, preferred_element_type=result)
    if dy.shape[1] * sum(x.shape) < x.size:  # a few columns, an adapter's: they and the result are the smaller to turn
        return _weight_gradient(dy, x, result).T
    alone = jax.lax.optimization_barrier
    return alone(_matmul(alone(alone(x).T), alone(dy), result))


_product.defvjp(_product_forward, _product_backward)
