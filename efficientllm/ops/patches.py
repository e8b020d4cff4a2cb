"""Patches of images as tokens: their order, their features, and their fixed 2-D positions.

Letters: B images, h and w their sides in pixels, C channels, p the side of a patch, T tokens, c features of a patch.
A grid is `(rows, columns)` of tokens. Tokens are in raster order: row by row. A video has its frames as an axis before
the rows, in images and in grids, and a patch is of one frame.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError

Grid = tuple[int, ...]


def patchify(images_BhwC: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches, `[B, T, C p p]`, with features in the order channel, row, column.

    This is the order in which a convolution's weight `[D, C, p, p]` is flattened. `unpatchify` has another one. Raises
    UserError where a side is no multiple of the patch.
    """
    B, *_, h, w, C = images_BhwC.shape
    _check_divides("patch", patch, (h, w), "pixels")
    x = images_BhwC.reshape(-1, h // patch, patch, w // patch, patch, C)  # frames are images until they are tokens
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, C * patch * patch)


def unpatchify(x_BTc: jax.Array, grid: Grid, patch: int) -> jax.Array:
    """Joins patches to images `[B, h, w, C]`; features are in the order row, column, channel."""
    B, (*frames, rows, columns) = len(x_BTc), grid
    x = x_BTc.reshape(-1, rows, columns, patch, patch, x_BTc.shape[-1] // patch**2)
    return x.swapaxes(2, 3).reshape(B, *frames, rows * patch, columns * patch, -1)


def tile_order(grid: Grid, tile: int) -> np.ndarray:
    """Orders tokens by square tiles: the raster index of the token at each place, `[T]`.

    Tiles follow in raster order, and so do tokens within a tile. So `tile * tile` tokens in a row are a square, of one
    frame in a video. Its inverse is `np.argsort` of it. Raises FieldError where a side is no multiple of the tile.
    """
    *_, rows, columns = grid
    _check_divides("tile", tile, (rows, columns), "tokens")
    raster = np.arange(math.prod(grid)).reshape(-1, rows // tile, tile, columns // tile, tile)
    return raster.swapaxes(2, 3).reshape(-1)


def coordinates(grid: Grid) -> np.ndarray:
    """Returns the `(row, column)` of each token of a grid, int32 `[T, 2]`; of a video `(frame, row, column)`."""
    return np.indices(grid, np.int32).reshape(len(grid), -1).T


def sincos_2d(grid: Grid, dim: int, scale: float = 1.0, table: int | None = None) -> np.ndarray:
    """Computes the fixed 2-D sine and cosine positions of a grid, float32 `[T, D]`: `sincos` of its coordinates.

    `table` is the side of the square of tokens from whose centre the grid is cropped (SD3: arXiv:2403.03206, Section
    5.3.2); None for the grid itself. Raises FieldError for a grid larger than the table.
    """
    start = 0 if table is None else crop_start(grid, table)
    return sincos(coordinates(grid) + start, dim, scale)


def crop_start(grid: Grid, table: int) -> np.ndarray:
    """Returns the first row and column of a grid in the middle of a square table of tokens.

    Raises FieldError for a grid larger than the table, and for one of a video.
    """
    if len(grid) != 2:
        raise FieldError("position", f"table = {table} holds rows and columns; this grid has {len(grid)} axes")
    rows, columns = grid
    if max(rows, columns) > table:
        raise FieldError("position", f"table = {table} holds no grid of {rows} x {columns} tokens")
    return np.array([(table - rows) // 2, (table - columns) // 2], np.int32)


def sincos(coordinates: np.ndarray | jax.Array, dim: int, scale: float = 1.0) -> np.ndarray | jax.Array:
    """Computes fixed 2-D sine and cosine positions of coordinates `[..., (row, column)]`, float32 `[..., D]`.

    The first half of the channels is of the column, the second of the row (MAE, DiT). Each half is `[sin | cos]` of
    `scale * coordinate * 10000^(-i / (D / 4))`. Angles are float64 for coordinates of NumPy, which the host has, and
    float32 for traced ones. Raises FieldError for a dim that is no multiple of 4.
    """
    if dim % 4:
        raise FieldError("position", f"sincos2d needs a dim that is a multiple of 4; {dim} is none")
    numpy = np if isinstance(coordinates, np.ndarray) else jnp
    frequency = numpy.asarray(10_000.0 ** (-np.arange(dim // 4) / (dim // 4)))
    row, column = (scale * coordinates[..., axis, None] * frequency for axis in (0, 1))
    waves = [wave(angle) for angle in (column, row) for wave in (numpy.sin, numpy.cos)]
    return numpy.concatenate(waves, -1).astype(np.float32)


def _check_divides(field, side, sides, unit):
    if any(length % side for length in sides):
        problem = f"{field} = {side} does not divide {sides[0]} x {sides[1]} {unit}; take a divisor of both"
        raise FieldError("embed", problem)
