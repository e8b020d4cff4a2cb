"""Protocol of a positional encoding: an addition to embeddings, a rotation of heads, or a bias of the scores."""

import typing

import flax.linen as nn
import jax

from efficientllm.ops.attention import Mask

# Adds to the scores: `(mask, queries, keys)`, the ranges as in `Mask.rows`, to float32 `[B or 1, H, T, S]`.
Bias = typing.Callable[[Mask, tuple[int, int], tuple[int, int]], jax.Array]


class Position(nn.Module):
    """Base class of positional encodings; a subclass overrides the one method that it acts through.

    `acts_on` names where: `embedding` (`embed`), `heads` (`rotate`, of queries and keys), `scores` (`bias`); or None.
    `Mixer.admits` lists what a mixer supports; an empty list is a mixer without positions.
    """

    acts_on: typing.ClassVar[str | None] = None
    by_length = False  # whether the rotation depends on the length of a row; `rotate` then takes `reach_B` too
    max_positions = None  # the longest row; None is no limit
    switches_at = None  # the length beyond which all keys are rotated again, those of a KV cache too

    def embed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Adds positions to the embeddings."""
        return x_BTD

    def rotate(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotates queries or keys by their positions."""
        return x_BTHK

    def bias(self, num_heads: int) -> Bias | None:
        """Returns the bias of the attention scores (`Bias`); None without."""
        return None

    def score_scale(self) -> float:
        """Returns the factor on the attention scale."""
        return 1.0
