"""Rows of tokens some of which stand for images: their slots and their positions.

Letters: B rows, T tokens, A axes of a position (time, row, column).
"""

import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.embeds.vision_language import VisionLM
from efficientllm.embeds.vision_tower import Images
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.vision.tower_rows import PreparedImage, merged_grid, tower_rows


class Prompt(typing.NamedTuple):
    """A record: token ids with one image token for each image, or one for each of its tokens; and its images."""

    ids: Sequence[int]
    pictures: Sequence[PreparedImage] = ()
    name: str = "a prompt"


class TokenRow(typing.NamedTuple):
    """One row.

    Args:
      ids_T: token ids, an image token for each token of an image.
      image_T: the image that a token stands for, -1 for text.
      coordinates_TA: of a token, by the model's rule; A is 1 where positions are the token's number.
      next_position: that of the token after the row.
    """

    ids_T: np.ndarray
    image_T: np.ndarray
    coordinates_TA: np.ndarray
    next_position: int

    @property
    def delta(self) -> int:
        """What is added to a later token's number for its position."""
        return self.next_position - len(self.ids_T)


def token_row(lm: VisionLM, prompt: Prompt) -> TokenRow:
    """Expands image tokens and computes positions. Raises UserError, with the record's name, where counts differ."""
    counts = [picture.tokens for picture in prompt.pictures]
    ids = np.asarray(prompt.ids, np.int32)
    ids = np.repeat(ids, token_repeats(ids, counts, lm.image_token, prompt.name))
    image_T: np.ndarray = np.full(len(ids), -1, np.int32)
    image_T[ids == lm.image_token] = np.repeat(np.arange(len(counts)), counts)
    grids = [merged_grid(picture.grid, lm.vision.merge) for picture in prompt.pictures]
    coordinates_TA, following = token_positions(image_T, grids, lm.axes)
    return TokenRow(ids, image_T, coordinates_TA, following)


def token_repeats(ids: np.ndarray, counts: Sequence[int], image_token: int, name: str) -> np.ndarray:
    """Returns how often each id stands in a row where image i has `counts[i]` tokens, `[T]`.

    Image tokens may be one for each image, or one for each of its tokens already. Raises UserError, with the record's
    name, for any other number.
    """
    is_image = ids == image_token
    repeats: np.ndarray = np.ones(len(ids), np.int64)
    found = int(is_image.sum())
    if found == len(counts):
        repeats[is_image] = counts
    elif found != sum(counts):
        raise UserError(
            f"{name}: {found} image tokens (id {image_token}) and {len(counts)} images of {sum(counts)} tokens; "
            "write one image token for each image"
        )
    return repeats


def token_positions(image_T: np.ndarray, grids: Sequence[tuple[int, int, int]], axes: int) -> tuple[np.ndarray, int]:
    """Computes the coordinates of tokens, int32 `[T, A]`, and the position of the token after them.

    With one axis they are the tokens' numbers. With three (M-RoPE: Qwen2-VL, arXiv:2409.12191, Section 2.1) text counts
    on in all; an image at c has time c, and c plus the row and the column of its merged grid; the text after it is at c
    plus the longer side of the grid.
    """
    numbers: np.ndarray = np.arange(len(image_T), dtype=np.int32)
    if axes == 1:
        return numbers[:, None], len(image_T)
    coordinates_TA: np.ndarray = np.empty((len(image_T), axes), np.int32)
    starts: np.ndarray = np.flatnonzero(np.diff(image_T, prepend=-2))
    current = 0
    for start, stop in zip(starts, [*starts[1:], len(image_T)], strict=True):
        if (image := image_T[start]) < 0:
            coordinates_TA[start:stop] = (current + numbers[: stop - start])[:, None]
            current += int(stop - start)
        else:
            coordinates_TA[start:stop] = current + np.indices(grids[image]).reshape(3, -1).T
            current += max(grids[image][1:])
    return coordinates_TA, current


class PromptBatch(typing.NamedTuple):
    """Rows of a batch, padded at the end: ids, their Context, and each row."""

    tokens_BT: np.ndarray
    ctx: Context
    rows: list[TokenRow]


def make_batch(lm: VisionLM, prompts: Sequence[Prompt], length: int = 0) -> PromptBatch:
    """Makes the batch of several records for one pass, padded to `length` tokens or the longest row."""
    rows = [token_row(lm, prompt) for prompt in prompts]
    towers = tower_rows(lm.vision, [prompt.pictures for prompt in prompts])
    length = max(length, *(len(row.ids_T) for row in rows))

    def padded(arrays, value):
        return np.stack([np.concatenate([a, np.full((length - len(a), *a.shape[1:]), value, a.dtype)]) for a in arrays])

    tokens_BT = padded([row.ids_T for row in rows], 0)
    segments_BT = padded([np.ones(len(row.ids_T), np.int32) for row in rows], 0)
    slots_BT = padded([slots_of(row, slots) for row, slots in zip(rows, towers.slots, strict=True)], -1)
    numbers_BT = padded([np.arange(len(row.ids_T), dtype=np.int32) for row in rows], 0)
    coordinates_BTA = padded([row.coordinates_TA for row in rows], 0) if lm.axes > 1 else None
    ctx = Context.packed(numbers_BT, segments_BT)
    has_images = any(len(prompt.pictures) for prompt in prompts)
    images = Images(slots_BT, towers.patches) if has_images else None
    return PromptBatch(tokens_BT, ctx.replace(coordinates_BTA=coordinates_BTA, images=images), rows)


def slots_of(row: TokenRow, slots: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the feature in each token's place, int32 `[T]`; -1 for text. `slots` are those of the row's images."""
    slots_T: np.ndarray = np.full(len(row.ids_T), -1, np.int32)
    slots_T[row.image_T >= 0] = np.concatenate([*slots, np.zeros(0, np.int32)])
    return slots_T
