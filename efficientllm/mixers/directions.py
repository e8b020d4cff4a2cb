"""Both directions of a row, for mixers that read it from start to end.

The rows of a batch stand beside their mirror images, so that one scan reads both; its outputs are added up. Letters: X
the axes after the tokens.
"""

import jax
import jax.numpy as jnp

from efficientllm.mixers import block_selection
from efficientllm.ops.attention import Context


def positions(ctx: Context, shape: tuple[int, int]) -> jax.Array:
    """Returns the place of each token in its document, in the order in which it is read.

    `[B, T]`, or of a bidirectional row `[2 B, T]`: a row, then its mirror image.
    """
    if ctx.mask.order == "causal":
        return ctx.positions_BT
    B, T = shape
    index_T = jnp.arange(T)
    forward_BT = index_T - block_selection.document_starts(ctx.mask, T)
    backward_BT = jnp.flip(block_selection.document_ends(ctx.mask, T) - index_T, 1)
    both = jnp.broadcast_to(jnp.stack([forward_BT, backward_BT], 1), (B, 2, T))
    return both.reshape(2 * B, T)


def split(ctx: Context, x_BTX: jax.Array) -> jax.Array:
    """Returns the rows as a scan reads them: `[B, T, ...]`, or of bidirectional rows `[2 B, T, ...]`."""
    if ctx.mask.order == "causal":
        return x_BTX
    return jnp.stack([x_BTX, jnp.flip(x_BTX, 1)], 1).reshape(-1, *x_BTX.shape[1:])


def join(ctx: Context, y_BTX: jax.Array) -> jax.Array:
    """Adds up the outputs of both directions, `[2 B, T, ...] -> [B, T, ...]`."""
    if ctx.mask.order == "causal":
        return y_BTX
    both = y_BTX.reshape(-1, 2, *y_BTX.shape[1:])
    return both[:, 0] + jnp.flip(both[:, 1], 1)
