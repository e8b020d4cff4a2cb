"""Fixed 2-D sine and cosine positions added to the embeddings of patches."""

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError
from efficientllm.ops.patches import crop_start, sincos
from efficientllm.positions.base import Position
from efficientllm.registry import register


@register("position", "sincos2d")
class SinCos2D(Position):
    """Fixed 2-D positions of a grid of patches (MAE: He et al. 2021, arXiv:2111.06377; DiT); see `patches.sincos`.

    Args:
      scale: a coordinate is the index of a row or a column, times it.
      table: the side of the square of tokens from whose centre a grid is cropped (SD3); 0 is none.
    """

    scale: float = 1.0
    table: int = 0

    acts_on = "embedding"
    axes = 2

    def embed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Adds positions to the embeddings, by coordinates `[B or 1, T, 2]`; positions `[B, T]` are both coordinates.

        Coordinates that are a NumPy array become a constant table, computed in float64.
        """
        if positions_BT.ndim == 2:
            positions_BT = jnp.stack([positions_BT, positions_BT], -1)
        if self.table:
            if not isinstance(positions_BT, np.ndarray):
                raise FieldError(
                    "position", f"table = {self.table}: needs the rows and columns of a picture; leave it 0"
                )
            positions_BT = positions_BT + crop_start(1 + np.max(positions_BT, (0, 1)), self.table)
        return (x_BTD.astype(jnp.float32) + sincos(positions_BT, x_BTD.shape[-1], self.scale)).astype(x_BTD.dtype)
