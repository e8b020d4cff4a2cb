"""Token shift: a layer's input mixed with the previous token's (RWKV: Peng et al. 2023, arXiv:2305.13048, Eq. 11)."""

import typing

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError


def shift(
    x_BTD: jax.Array, positions_BT: jax.Array, previous_BD: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Shifts a row by one token, with zeros before the first token of a document.

    Args:
      previous_BD: the token before the row, from the state; None without a state.

    Returns `(shifted_BTD, the row's last token [B, D] or None without a state)`. Raises UserError for a state whose
    tokens have another width.
    """
    D = x_BTD.shape[-1]
    if previous_BD is None:
        before_B1D, last_BD = jnp.zeros_like(x_BTD[:, :1]), None
    elif previous_BD.shape[-1] != D:
        raise UserError(f"dim = {previous_BD.shape[-1]} is not the width of the model, {D}: leave it to the size")
    else:
        before_B1D, last_BD = previous_BD[:, None].astype(x_BTD.dtype), x_BTD[:, -1].astype(previous_BD.dtype)
    shifted_BTD = jnp.concatenate([before_B1D, x_BTD[:, :-1]], 1)
    return jnp.where(positions_BT[..., None] == 0, 0, shifted_BTD), last_BD


def mix(x_BTD: jax.Array, shifted_BTD: jax.Array, share_D: jax.Array) -> jax.Array:
    """Interpolates a row and its shifted row, one share for each channel: `x + (shifted - x) * share`."""
    return x_BTD + (shifted_BTD - x_BTD) * share_D.astype(x_BTD.dtype)


def share_init(power: float) -> typing.Callable:
    """Makes the shares' initializer: `1 - (i / D)^power` for channel i, falling from 1 to about 0 (RWKV-LM's)."""

    def init(_, shape, dtype=jnp.float32):
        return 1 - (jnp.arange(shape[0], dtype=dtype) / shape[0]) ** power

    return init
