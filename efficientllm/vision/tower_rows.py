"""Rows of a vision tower's slots: which patch of which image stands where, and which patches read each other.

Letters: S slots, c features of a patch, m the side of a merge group. Images of a row follow each other. Patches are in
groups of m x m, groups in raster order of their frame, as processors make them.
"""

import functools
import math
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.embeds.vision_tower import PatchArrays, VisionTower
from efficientllm.errors import UserError

_Grid = tuple[int, int, int]  # frames or tiles, rows and columns of patches


class PreparedImage(typing.NamedTuple):
    """An image that a processor made ready.

    Args:
      pixels_Pc: float32, a row a patch; features in the order channel, frame, row, column.
      grid: its frames or tiles, and the rows and columns of patches of each.
      tokens: the tokens that stand for it.
    """

    pixels_Pc: np.ndarray
    grid: _Grid
    tokens: int


class TowerRows(typing.NamedTuple):
    """Patches of several rows, and `slots[row][image]`, the feature of each token of each image."""

    patches: PatchArrays
    slots: list[list[np.ndarray]]


class _Row(typing.NamedTuple):
    """Groups of one row: arrays `[G, m^2, ...]` by group, and `order`, the group in each place or -1."""

    pixels: np.ndarray
    positions: np.ndarray
    coordinates: np.ndarray
    frames: np.ndarray
    windows: np.ndarray
    order: np.ndarray
    classes: int


def tower_rows(tower: VisionTower, rows: Sequence[Sequence[PreparedImage]], multiple: int = 1) -> TowerRows:
    """Lays out the images of several rows, `[B, S]` with S a multiple of `multiple` and of the tower's bins.

    Raises UserError for an image whose patches are not the tower's.
    """
    laid_out = [_lay_out(tower, images) for images in rows]
    group = tower.merge**2
    unit = np.lcm(max(tower.bin, group), multiple)
    needed = [len(row.order) * group + row.classes for row in laid_out]
    slots = int(max(1, -(-max(needed) // unit)) * unit)
    fields = [_place(tower, row, slots) for row in laid_out]
    patches = PatchArrays(*(np.stack(arrays) for arrays in zip(*fields, strict=True)))
    patches = patches if tower.bin else patches._replace(windows_BS=None)
    return TowerRows(patches, [_feature_slots(row, images) for row, images in zip(laid_out, rows, strict=True)])


@functools.lru_cache
def count_slots(tower: VisionTower, grids: tuple[_Grid, ...]) -> int:
    """Counts the slots that images of some grids take in a row."""
    rows = tower_rows(tower, [[blank_image(tower, grid) for grid in grids]])
    return rows.patches.frames_BS.shape[1] if grids else 0


def blank_image(tower: VisionTower, grid: _Grid) -> PreparedImage:
    """Makes an image of a grid, all zeros."""
    patches = math.prod(grid)
    return PreparedImage(np.zeros((patches, tower.pixel_features), np.float32), grid, patches // tower.merge**2)


def merged_grid(grid: _Grid, merge: int) -> _Grid:
    """Returns the grid of merge groups."""
    frames, rows, columns = grid
    return frames, rows // merge, columns // merge


def _lay_out(tower, images):
    m, group = tower.merge, tower.merge**2
    parts, windows, frame, first = [], [], 0, 0
    for picture in images:
        _check(tower, picture)
        frames, rows, columns = grid = merged_grid(picture.grid, m)
        number = np.arange(frames * rows * columns)
        of_frame, row, column = (axis[:, None] for axis in np.unravel_index(number, grid))
        inner_row, inner_column = np.divmod(np.arange(group), m)
        coordinates = np.stack([row * m + inner_row, column * m + inner_column], -1)
        raster = 1 + coordinates[..., 0] * picture.grid[2] + coordinates[..., 1]
        pixels = picture.pixels_Pc.reshape(len(number), group, -1)
        parts.append((pixels, raster if tower.grid else 0 * raster, coordinates, frame + 1 + of_frame + 0 * raster))
        if tower.window:
            windows += [first + window for window in group_windows(grid, tower.window)]
        frame, first = frame + frames, first + len(number)
    if not parts:
        empty = np.zeros((0, group), np.int32)
        parts.append((np.zeros((0, group, tower.pixel_features), np.float32), empty, np.zeros((0, group, 2)), empty))
    pixels, positions, coordinates, frames = map(np.concatenate, zip(*parts, strict=True))
    order = _bins(windows, tower.window**2) if tower.window else np.arange(first)
    window_of = np.zeros(frames.shape, np.int32)
    for i, window in enumerate(windows):
        window_of[window] = i + 1
    return _Row(pixels, positions, coordinates, frames, window_of, order, frame if tower.class_token else 0)


def _check(tower, picture):
    frames, rows, columns = picture.grid
    expected = (frames * rows * columns, tower.pixel_features)
    if picture.pixels_Pc.shape != expected or rows % tower.merge or columns % tower.merge:
        shape = list(picture.pixels_Pc.shape)
        raise UserError(
            f"an image of {shape} patches in a grid of {picture.grid}: the tower reads {list(expected)}, in squares "
            f"of {tower.merge}; prepare it with the model's own processor"
        )
    if tower.grid and (rows, columns) != (tower.grid, tower.grid):
        raise UserError(
            f"an image of {rows} x {columns} patches: the tower has positions for {tower.grid} x {tower.grid}; resize "
            "it, or cut it into tiles"
        )


def group_windows(grid: _Grid, side: int) -> list[np.ndarray]:
    """Returns the groups of each window, from the top left of each frame; windows at the edges are smaller."""
    numbers = np.arange(np.prod(grid)).reshape(grid)
    return [
        frame[row : row + side, column : column + side].reshape(-1)
        for frame in numbers
        for row in range(0, grid[1], side)
        for column in range(0, grid[2], side)
    ]


def _bins(windows, capacity):
    """Puts windows into bins of `capacity` groups, first fit: the group in each place, -1 for none."""
    bins: list[list[np.ndarray]] = []
    space: dict[int, int] = {}  # of bins that are not full
    for window in windows:
        size = len(window)
        number = next((i for i, left in space.items() if left >= size), len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(window)
        space[number] = space.get(number, capacity) - size
        if not space[number]:
            del space[number]
    order = np.full((len(bins), capacity), -1)
    for place, content in zip(order, bins, strict=True):
        groups = np.concatenate(content)
        place[: len(groups)] = groups
    return order.reshape(-1)


def _place(tower, row, slots):
    """The arrays of `PatchArrays` of one row, `[S, ...]`; class tokens follow all patches."""

    def place(values, dtype):
        by_group = np.concatenate([values, np.zeros((1, *values.shape[1:]), values.dtype)])[row.order]
        by_slot = by_group.reshape(-1, *values.shape[2:])
        rest = np.zeros((slots - len(by_slot), *values.shape[2:]), values.dtype)
        return np.concatenate([by_slot, rest]).astype(dtype)

    arrays = [place(row.pixels, np.float32)]
    arrays += [place(values, np.int32) for values in (row.positions, row.coordinates, row.frames, row.windows)]
    first = len(row.order) * tower.merge**2
    arrays[3][first : first + row.classes] = 1 + np.arange(row.classes)
    return arrays


def _feature_slots(row, images):
    place_of = np.empty(len(row.pixels), np.int32)
    places = np.flatnonzero(row.order >= 0)
    place_of[row.order[places]] = places
    return np.split(place_of, np.cumsum([picture.tokens for picture in images])[:-1]) if images else []
