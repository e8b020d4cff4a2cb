"""What a position is to a model: something added to the embeddings, a rotation of heads, or a bias of the scores."""

import typing

import flax.linen as nn
import jax

from efficientllm.ops.attention import Mask

# Adds to the scores: `(mask, queries, keys)`, the ranges as in `Mask.rows`, to float32 `[B or 1, H, T, S]`.
Bias = typing.Callable[[Mask, tuple[int, int], tuple[int, int]], jax.Array]


class Position(nn.Module):
    """Does nothing anywhere; a position overrides the one method that it acts through.

    `acts_on` names it: `embedding`, `heads` (queries and keys), `scores`, or None. A mixer lists what it admits as
    `admits`; a mixer without the list has no use for positions.
    """

    acts_on: typing.ClassVar[str | None] = None
    by_length = False  # whether a row's rotation depends on how many tokens it has; `rotate` then takes them too
    max_positions = None  # tokens that a row may have; None is no limit
    switches_at = None  # a length beyond which keys are rotated anew, those of a state too

    def embed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The embeddings with their positions."""
        return x_BTD

    def rotate(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Queries or keys with their positions."""
        return x_BTHK

    def bias(self, num_heads: int) -> Bias | None:
        """None, or what the scores get: a function of `(mask, queries, keys)`, as `Mask.distance`, to float32
        `[B or 1, H, T, S]`."""
        return None

    def score_scale(self) -> float:
        """What the attention scale is multiplied by."""
        return 1.0
