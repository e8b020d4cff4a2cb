"""Clips computed in chunks of frames, each with what it needs of the frames before, in the memory of one chunk."""

import typing

import jax
import jax.numpy as jnp

from efficientllm.typing import PyTree

# `apply(frames, past) -> (result, past)`; without a past, frames are the start of a clip.
Apply = typing.Callable[[jax.Array, PyTree | None], tuple[jax.Array, PyTree]]


def compute_in_chunks(apply: Apply, x_BFhwC: jax.Array, chunk: int, rate_in: int, rate_out: int) -> jax.Array:
    """Computes the first frame of a clip, and then chunks in a scan.

    Args:
      x_BFhwC: `1 + rate_in * n` frames; the result has `1 + rate_out * n`.
      chunk: how many of the n are computed at a time.
    """
    first, past = apply(x_BFhwC[:, :1], None)
    steps = (x_BFhwC.shape[1] - 1) // rate_in
    result = jnp.zeros((first.shape[0], 1 + steps * rate_out, *first.shape[2:]), first.dtype)
    result = jax.lax.dynamic_update_slice_in_dim(result, first, 0, 1)

    def compute(carry, start, steps):
        past, result = carry
        x = jax.lax.dynamic_slice_in_dim(x_BFhwC, 1 + start * rate_in, steps * rate_in, 1)
        y, past = apply(x, past)
        return past, jax.lax.dynamic_update_slice_in_dim(result, y, 1 + start * rate_out, 1)

    carry, rest = (past, result), steps % chunk
    if steps >= chunk:
        starts = jnp.arange(0, steps - rest, chunk)
        carry, _ = jax.lax.scan(lambda carry, start: (compute(carry, start, chunk), None), carry, starts)
    return compute(carry, steps - rest, rest)[1] if rest else carry[1]
