"""Kernels of `weights.matmul`'s products on CPUs: XLA's, and native ones where the CPU has the instructions."""

import typing

import jax
import jax.numpy as jnp

from efficientllm.ops.native import matmul as native
from efficientllm.registry import register


class MatmulKernel(typing.NamedTuple):
    """A kernel of matrix products.

    Args:
      is_usable: `(product dtype) -> bool`, whether the traced program may call it.
      multiply: `(a, b, product, out_dtype, transpose_a, transpose_b) -> [m, n]`, see `native.matmul.matmul`.
    """

    is_usable: typing.Callable[[jnp.dtype], bool]
    multiply: typing.Callable[..., jax.Array]


register("matmul_kernel", "native")(MatmulKernel(native.is_usable, native.matmul))
