"""Protocol of a positional encoding: an addition to embeddings, a rotation of heads, or a bias of the scores."""

import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from efficientllm.ops.attention import Mask

# Adds to the scores: `(mask, queries, keys)`, the ranges as in `Mask.rows`, to float32 `[B or 1, H, T, S]`.
Bias = typing.Callable[[Mask, tuple[int, int], tuple[int, int]], jax.Array]


class Position(nn.Module):
    """Base class of positional encodings; a subclass overrides the one method that it acts through.

    `acts_on` names where: `embedding` (`embed`), `heads` (`rotate`, of queries and keys), `scores` (`bias`); or None.
    `Mixer.admits` lists what a mixer supports; an empty list is a mixer without positions.
    """

    acts_on: typing.ClassVar[str | None] = None
    axes: typing.ClassVar[int] = 1  # with several axes, `rotate` takes `Context.coordinates_BTA` where it is there
    by_length = False  # whether the rotation depends on the length of a row; `rotate` then takes `reach_B` too
    max_positions = None  # the longest row; None is no limit
    shared = False  # whether all layers share one bias: `init_memo` makes it, and `bias` takes it from `ctx.memo`
    switches_at = None  # the length beyond which all keys are rotated again, those of a KV cache too

    def embed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Adds positions to the embeddings; with several `axes`, coordinates `[B or 1, T, A]` may stand for them."""
        return x_BTD

    def rotate(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotates queries or keys by their positions."""
        return x_BTHK

    def check_coordinates(self, coordinates_TA: np.ndarray) -> None:
        """Raises FieldError for coordinates, which the host has, that it has no rotation for."""

    def bias(self, num_heads: int) -> Bias | None:
        """Returns the bias of the attention scores (`Bias`); None without. If `shared`, it takes `ctx.memo` too."""
        return None

    def init_memo(self, num_heads: Sequence[int]) -> dict[str, jax.Array]:
        """Returns what `bias` reads in every layer where it is `shared`; the model calls it with the mixers' heads."""
        return {}

    def score_scale(self) -> float:
        """Returns the factor on the attention scale."""
        return 1.0
