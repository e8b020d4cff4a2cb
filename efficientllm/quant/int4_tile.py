"""Arithmetic on a tile of int4 weights, shared by the kernels of every platform."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp

if typing.TYPE_CHECKING:
    from efficientllm.quant.int4 import Int4


def weights_of(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, minimum: jax.Array | None) -> jax.Array:
    """Dequantize float32 codes as `int4.decode` does; the arrays broadcast."""
    if minimum is not None:
        return codes * scale + minimum
    return (codes - (8.0 if zero is None else zero)) * scale


def dot(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """Compute the float32 product of `x[tokens, bytes]` with `w`, contracted over its `axis`."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, w.astype(x.dtype), (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def named_scales(leaf: Int4) -> dict[str, jax.Array]:
    """A leaf's scale, zero point and minimum by name, without those that are None."""
    return {name: x for name in ("scale", "zero", "minimum") if (x := getattr(leaf, name)) is not None}
