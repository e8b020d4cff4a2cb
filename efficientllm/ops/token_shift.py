"""Token shift: a layer's input beside that of the token before (RWKV: Peng et al. 2023, arXiv:2305.13048, Eq. 11)."""

import jax.numpy as jnp

from efficientllm.errors import UserError


def shift(x_BTD, positions_BT, previous_BD=None):
    """What the token before each token holds: zeros ahead of a document's first.

    Args:
      previous_BD: the last token of what came before the row; None where the row is all there is.

    Returns `(shifted_BTD, the row's last token [B, D], None without a previous one)`. Raises UserError for a
    previous token of another width, which a state made for another `dim` has.
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


def mix(x_BTD, shifted_BTD, share_D):
    """`x + (shifted - x) * share`, a share a channel."""
    return x_BTD + (shifted_BTD - x_BTD) * share_D.astype(x_BTD.dtype)


def share_init(power):
    """Initialiser of the shares: `1 - (i / D)^power` for channel i, falling from 1 to about 0 (RWKV-LM's)."""

    def init(_, shape, dtype=jnp.float32):
        return 1 - (jnp.arange(shape[0], dtype=dtype) / shape[0]) ** power

    return init
