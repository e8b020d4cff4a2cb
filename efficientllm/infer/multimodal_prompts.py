"""Prompts with images for the engine: the features of their images, computed once, and the slots of their tokens."""

import functools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.embeds.vision_language import VisionLM, encode_images
from efficientllm.typing import Params
from efficientllm.vision.token_rows import Prompt, slots_of, token_row
from efficientllm.vision.tower_rows import tower_rows


class ImageRows(typing.NamedTuple):
    """Images of the rows of a batch; L is the length of the longest prompt.

    Args:
      features_BMD: of the images of each row.
      slots_BL: the feature in a token's place, -1 for text.
      coordinates_BLA: of the tokens, where the model's positions have several axes; else None.
      deltas_B: what is added to the number of a token after the prompt for its position.
    """

    features_BMD: jax.Array
    slots_BL: np.ndarray
    coordinates_BLA: np.ndarray | None
    deltas_B: np.ndarray

    def piece(self, rows: Sequence[int], starts: np.ndarray, size: int) -> "ImageRows":
        """Returns what a pass over `size` tokens of some rows needs, from `starts` on."""
        numbers_BT = np.asarray(starts)[:, None] + np.arange(size)
        places = np.asarray(rows)[:, None], numbers_BT
        coordinates = None if self.coordinates_BLA is None else self.coordinates_BLA[places]
        features = self.features_BMD if len(rows) == len(self.slots_BL) else self.features_BMD[np.asarray(rows)]
        return ImageRows(features, self.slots_BL[places], coordinates, self.deltas_B[np.asarray(rows)])


def encode_prompts(lm: VisionLM, params: Params, prompts: Sequence[Prompt]) -> tuple[list[list[int]], ImageRows]:
    """Computes the features of all images -> `(ids of each prompt, ImageRows)`.

    Raises UserError, with the record's name, where images and image tokens do not fit.
    """
    rows = [token_row(lm, prompt) for prompt in prompts]
    towers = tower_rows(lm.vision, [prompt.pictures for prompt in prompts])
    patches = jax.tree.map(jnp.asarray, towers.patches)
    features_BMD = _encode(lm, params, patches)
    slots = [slots_of(row, places) for row, places in zip(rows, towers.slots, strict=True)]
    deltas_B: np.ndarray = np.array([row.delta for row in rows], np.int32)
    coordinates = _padded([row.coordinates_TA for row in rows], 0) if lm.axes > 1 else None
    return [row.ids_T.tolist() for row in rows], ImageRows(features_BMD, _padded(slots, -1), coordinates, deltas_B)


@functools.partial(jax.jit, static_argnums=0)
def _encode(lm, params, patches):
    return encode_images(lm, params, patches)


def _padded(arrays, value):
    length = max(map(len, arrays))
    widths = [[(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)] for array in arrays]
    return np.stack([np.pad(a, width, constant_values=value) for a, width in zip(arrays, widths, strict=True)])
