"""Layouts of tensors on disk: how several of our parameters make one tensor, and the inverse.

Reading returns numpy views where possible, so that a slice reads little more than its own bytes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model that layouts depend on: head counts, the side and the frames of a patch, the width."""

    queries: int = 0
    keys: int = 0
    patch: int = 0
    dim: int = 0
    frames: int = 1


def transpose(x: np.ndarray) -> np.ndarray:
    """Swaps the last two axes; a vector stays."""
    return x.swapaxes(-1, -2) if x.ndim > 1 else x


def _flipped_shape(shape):
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else tuple(shape)


class Same:
    """One parameter, stored unchanged."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        """The shape on disk of parameters of `shapes`."""
        return tuple(shapes[0])

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        """Parameter number `index` of a tensor on disk."""
        return disk

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        """Joins the parameters into the tensor on disk."""
        return arrays[0]


class Rows(Same):
    """Kernels `[..., in, out]` stored as `[..., out, in]`, and vectors, concatenated along the output axis."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        flat = [_flipped_shape(shape) for shape in shapes]
        axis = -2 if len(flat[0]) > 1 else -1
        whole = list(flat[0])
        whole[axis] = sum(shape[axis] for shape in flat)
        return tuple(whole)

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        start, size = sum(shape[-1] for shape in shapes[:index]), shapes[index][-1]
        return transpose(disk[..., start : start + size, :] if disk.ndim > 1 else disk[start : start + size])

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        flat = [transpose(array) for array in arrays]
        return np.concatenate(flat, -2 if flat[0].ndim > 1 else -1) if len(flat) > 1 else flat[0]


class PerHead(Rows):
    """Rows `[heads, parts, width]`: q, k and v interleaved per head (GPT-NeoX's query_key_value)."""

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        split = disk.reshape(sizes.queries, len(shapes), -1, *disk.shape[1:])[:, index]
        return transpose(split.reshape(-1, *disk.shape[1:]))

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        flat = [transpose(array) for array in arrays]
        split = [array.reshape(sizes.queries, 1, -1, *array.shape[1:]) for array in flat]
        return np.concatenate(split, 1).reshape(-1, *flat[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class InterleavedPairs(Rows):
    """Rows of a head in interleaved rotary order (0, K/2, 1, K/2 + 1, ...), as llama.cpp stores Llama's q and k.

    Our rotary pairs are the two halves of a head. `of` names the head count: `queries` or `keys`.
    """

    of: str

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return transpose(self._exchanged(disk, (getattr(sizes, self.of), -1, 2)))

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return self._exchanged(transpose(arrays[0]), (getattr(sizes, self.of), 2, -1))

    def _exchanged(self, x, split):
        return x.reshape(*split, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


class ScaleShift(Rows):
    """Rows of a shift and a scale, stored with the scale before the shift (diffusers' SD3); other rows as they are.

    It is told from other rows by their number, twice the model's width.
    """

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return transpose(self._exchanged(disk, sizes))

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return self._exchanged(transpose(arrays[0]), sizes)

    def _exchanged(self, x, sizes):
        return np.concatenate(np.split(x, 2)[::-1]) if len(x) == 2 * sizes.dim else x


class Taps(Same):
    """Convolution filters `[W, C]` stored as `[C, 1, W]`, concatenated along channels."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        return (sum(shape[1] for shape in shapes), 1, shapes[0][0])

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        start = sum(shape[1] for shape in shapes[:index])
        return disk[start : start + shapes[index][1], 0].T

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return np.concatenate([array.T[:, None] for array in arrays])


@dataclasses.dataclass(frozen=True)
class Conv(Same):
    """A convolution `[h, w, in, out]` stored as `[out, in, h, w]`; `order` is that of the axes on disk.

    Of clips, `[h, w, frames, in, out]` is stored as `[out, in, frames, h, w]`.
    """

    order: tuple[int, ...] = (3, 2, 0, 1)

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        return tuple(shapes[0][axis] for axis in self.order)

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return disk.transpose(np.argsort(self.order))

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return arrays[0].transpose(self.order)


@dataclasses.dataclass(frozen=True)
class Pointwise(Same):
    """A kernel `[in, out]` stored as a convolution of one pixel, `[out, in, 1, 1]`, or a scale `[C]` as `[C, 1, 1]`.

    `ones` is how many axes of size 1 there are at the end.
    """

    ones: int = 2

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        return (*shapes[0][::-1], *(1,) * self.ones)

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return disk.reshape(disk.shape[: -self.ones]).T

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return arrays[0].T.reshape(self.shape([arrays[0].shape], sizes))


class Patch(Same):
    """A kernel of patches `[C p p, D]` stored as a convolution `[D, C, p, p]`, as `ops.patches.patchify` orders it."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        features, dim = shapes[0]
        return (dim, features // sizes.patch**2, sizes.patch, sizes.patch)

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return disk.reshape(len(disk), -1).T

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return arrays[0].T.reshape(self.shape([arrays[0].shape], sizes))


class VideoPatch(Patch):
    """A kernel of patches of t frames stored as a convolution `[D, C, t, p, p]`; features are in that order."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        dim, channels, *sides = super().shape(shapes, sizes)
        return (dim, channels // sizes.frames, sizes.frames, *sides)


class Tables(Same):
    """Tables `[rows, D]` stored one after another with an axis of one before them, `[1, all rows, D]`."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        return (1, sum(rows for rows, _ in shapes), shapes[0][1])

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        start = sum(rows for rows, _ in shapes[:index])
        return disk[0, start : start + shapes[index][0]]

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return np.concatenate(arrays)[None]


class Leading(Same):
    """A vector `[D]` stored with two axes of one before it, `[1, 1, D]`."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        return (1, 1, *shapes[0])

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return disk[0, 0]

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return arrays[0][None, None]


class Column(Same):
    """A kernel `[D, 1]` stored as a vector (llama.cpp's gate of the shared expert)."""

    def shape(self, shapes: Shapes, sizes: Sizes) -> Shape:
        return (shapes[0][0],)

    def take(self, disk: np.ndarray, index: int, shapes: Shapes, sizes: Sizes) -> np.ndarray:
        return disk[:, None]

    def join(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        return arrays[0][:, 0]


LAYOUTS = {
    "same": Same(),
    "rows": Rows(),
    "per_head": PerHead(),
    "query_pairs": InterleavedPairs("queries"),
    "key_pairs": InterleavedPairs("keys"),
    "taps": Taps(),
    "column": Column(),
    "conv": Conv(),
    "conv_3d": Conv((4, 3, 2, 0, 1)),
    "patch": Patch(),
    "video_patch": VideoPatch(),
    "tables": Tables(),
    "leading": Leading(),
    "scale_shift": ScaleShift(),
    "pointwise": Pointwise(),
    "pointwise_3d": Pointwise(3),
}
