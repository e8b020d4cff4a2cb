"""Images, or clips, computed in tiles: one program for all, whose peak memory is that of one tile and the result.

A tile is a core, which is its part of the result, and a halo around it as wide as convolutions reach. At the edge of
the image a tile ends with it. So convolutions give what they give for the whole image. Group norms need the moments of
the whole image: `sweeps` passes over all tiles compute them before the pass that makes the result. Pass 1 uses each
tile's own moments; pass k uses the merged moments of pass k-1. After n passes the first n norms are exact; later norms
are not guaranteed to improve. From the first pass on all tiles share their moments: there are no seams.
Without a sweep each tile has its own.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp

from efficientllm.autoencoders.convolutions import NormMoments, Tile, merge_moments
from efficientllm.typing import PyTree

Bounds = tuple[int, int, int, int]  # start of the window, start of the output core, own rows from and to


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How an image is computed in tiles, in latent pixels.

    Args:
      tile: side of a core.
      halo: width of the border around a core.
      zoom_in: pixels of the input per latent pixel, along each side.
      zoom_out: pixels of the result, likewise.
      sweeps: passes that compute the moments of group norms.
    """

    tile: int
    halo: int
    zoom_in: int
    zoom_out: int
    sweeps: int

    def window(self, size: int) -> int:
        """The side of a tile with its halo, in an image of `size`."""
        return min(self.tile + 2 * self.halo, size)

    def is_whole(self, x_BhwC: jax.Array) -> bool:
        """Whether one tile with its halo is all of an input."""
        return all(self.window(size) == size for size in self.latent_sides(x_BhwC))

    def latent_sides(self, x_BhwC: jax.Array) -> tuple[int, int]:
        """Height and width of the latent of an input."""
        height, width = x_BhwC.shape[-3:-1]
        return height // self.zoom_in, width // self.zoom_in

    def bounds(self, size: int) -> list[Bounds]:
        """Of each tile along a side of `size`: where its window and its core start, and which rows are its alone."""
        core = min(self.tile, size)
        starts = range(0, size, self.tile)
        cores = [min(start, size - core) for start in starts]  # the last overlaps the one before
        windows = [min(max(start - self.halo, 0), size - self.window(size)) for start in cores]
        ends = [min(start + self.tile, size) for start in starts]
        return list(zip(windows, cores, starts, ends, strict=True))


def decoder_halo(factor: int, layers: int) -> int:
    """Latent pixels around a core that the levels of a decoder reach, which zoom by `factor`.

    `layers` are the residual blocks of a level of the encoder; the decoder's have one more.
    """
    reach = 0
    for i in range(factor.bit_length()):
        reach = (2 * reach + 1 if i else 0) + 2 * (layers + 1)
    return -(-(reach + 1) // factor)


def encoder_halo(factor: int, layers: int) -> int:
    """Latent pixels around a core that the levels of an encoder reach."""
    reach = 1
    for i in range(factor.bit_length()):
        reach = (reach // 2 + 1 if i else reach) + 2 * layers  # a stride of 2 reaches one pixel to the right
    return reach


def compute_tiled(apply: typing.Callable, x_BhwC: jax.Array, tiling: Tiling) -> jax.Array:
    """Computes `apply` in tiles.

    Args:
      apply: `(window, tile, moments) -> (result, moments)` of a tile; it gets those of all norms, or None.
      x_BhwC: the input, `zoom_in` times the size of the latent; of clips `[B, F, h, w, C]`.
    """
    height, width = tiling.latent_sides(x_BhwC)
    tiles = jnp.asarray([(*row, *column) for row in tiling.bounds(height) for column in tiling.bounds(width)])
    window = functools.partial(_window, apply, x_BhwC, tiling, height, width)
    moments = _moments_of_norms(window, tiles, tiling.sweeps)
    return _assemble(functools.partial(window, moments), tiles, tiling, height, width)


def _window(apply, x_BhwC, tiling, height, width, moments, tile):
    """`apply` of one tile, whose bounds are the eight numbers `tile`."""
    top, _, first_row, last_row, left, _, first_column, last_column = tile
    zoom = tiling.zoom_in
    leading, channels = x_BhwC.shape[:-3], x_BhwC.shape[-1]
    size = (*leading, tiling.window(height) * zoom, tiling.window(width) * zoom, channels)
    x = jax.lax.dynamic_slice(x_BhwC, (*(0,) * len(leading), top * zoom, left * zoom, 0), size)
    core = jnp.stack([first_row - top, last_row - top, first_column - left, last_column - left])
    return apply(x, Tile(core, tiling.window(height)), moments)


def _moments_of_norms(window, tiles, sweeps):
    """The moments of all norms after so many passes; None without one."""
    if not sweeps:
        return None

    def again(moments, _):
        return (_sweep(functools.partial(window, moments), tiles), None)

    return jax.lax.scan(again, _sweep(functools.partial(window, None), tiles), length=sweeps - 1)[0]


def _sweep(window, tiles) -> PyTree:
    """The moments of all norms, merged over all tiles."""

    def add(moments, tile):
        _, tile_moments = window(tile)
        return merge_all(moments, tile_moments), None

    shapes = jax.eval_shape(window, tiles[0])[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, tiles)[0]


def merge_all(a: PyTree, b: PyTree) -> PyTree:
    """Merges two trees of `NormMoments`."""
    return jax.tree.map(merge_moments, a, b, is_leaf=lambda leaf: isinstance(leaf, NormMoments))


def _assemble(window, tiles, tiling, height, width):
    """The results of all tiles, each core in its place."""
    zoom = tiling.zoom_out
    rows, columns = (min(tiling.tile, size) * zoom for size in (height, width))

    result = jax.eval_shape(window, tiles[0])[0]
    leading, channels = result.shape[:-3], result.shape[-1]
    start = (0,) * len(leading)

    def write(whole, tile):
        top, row, _, _, left, column, _, _ = tile
        y_BhwC = window(tile)[0]
        core = (*leading, rows, columns, channels)
        y_BhwC = jax.lax.dynamic_slice(y_BhwC, (*start, (row - top) * zoom, (column - left) * zoom, 0), core)
        return jax.lax.dynamic_update_slice(whole, y_BhwC, (*start, row * zoom, column * zoom, 0)), None

    whole = jnp.zeros((*leading, height * zoom, width * zoom, channels), result.dtype)
    return jax.lax.scan(write, whole, tiles)[0]
