"""Layouts of tensors on disk: how several of our parameters make one tensor, and the inverse.

Reading returns numpy views where possible, so that a slice reads little more than its own bytes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Head counts of queries and keys, for layouts that depend on them."""

    queries: int = 0
    keys: int = 0


def transpose(x: np.ndarray) -> np.ndarray:
    """Swaps the last two axes; a vector stays."""
    return x.swapaxes(-1, -2) if x.ndim > 1 else x


def _flipped_shape(shape):
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else tuple(shape)


class Same:
    """One parameter, stored unchanged."""

    def shape(self, shapes: Shapes, heads: Heads) -> Shape:
        """The shape on disk of parameters of `shapes`."""
        return tuple(shapes[0])

    def take(self, disk: np.ndarray, part: int, shapes: Shapes, heads: Heads) -> np.ndarray:
        """Parameter number `part` of a tensor on disk."""
        return disk

    def join(self, parts: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
        """Joins the parameters into the tensor on disk."""
        return parts[0]


class Rows(Same):
    """Kernels `[..., in, out]` stored as `[..., out, in]`, and vectors, concatenated along the output axis."""

    def shape(self, shapes: Shapes, heads: Heads) -> Shape:
        flat = [_flipped_shape(shape) for shape in shapes]
        axis = -2 if len(flat[0]) > 1 else -1
        whole = list(flat[0])
        whole[axis] = sum(shape[axis] for shape in flat)
        return tuple(whole)

    def take(self, disk: np.ndarray, part: int, shapes: Shapes, heads: Heads) -> np.ndarray:
        sizes = [shape[-1] for shape in shapes]
        start = sum(sizes[:part])
        return transpose(
            disk[..., start : start + sizes[part], :] if disk.ndim > 1 else disk[start : start + sizes[part]]
        )

    def join(self, parts: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
        flat = [transpose(part) for part in parts]
        return np.concatenate(flat, -2 if flat[0].ndim > 1 else -1) if len(flat) > 1 else flat[0]


class PerHead(Rows):
    """Rows `[heads, parts, width]`: q, k and v interleaved per head (GPT-NeoX's query_key_value)."""

    def take(self, disk: np.ndarray, part: int, shapes: Shapes, heads: Heads) -> np.ndarray:
        split = disk.reshape(heads.queries, len(shapes), -1, *disk.shape[1:])[:, part]
        return transpose(split.reshape(-1, *disk.shape[1:]))

    def join(self, parts: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
        flat = [transpose(part) for part in parts]
        split = [part.reshape(heads.queries, 1, -1, *part.shape[1:]) for part in flat]
        return np.concatenate(split, 1).reshape(-1, *flat[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class InterleavedPairs(Rows):
    """Rows of a head in interleaved rotary order (0, K/2, 1, K/2 + 1, ...), as llama.cpp stores Llama's q and k.

    Our rotary pairs are the two halves of a head. `of` names the head count: `queries` or `keys`.
    """

    of: str

    def take(self, disk: np.ndarray, part: int, shapes: Shapes, heads: Heads) -> np.ndarray:
        return transpose(self._exchanged(disk, (getattr(heads, self.of), -1, 2)))

    def join(self, parts: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
        return self._exchanged(transpose(parts[0]), (getattr(heads, self.of), 2, -1))

    def _exchanged(self, x, split):
        return x.reshape(*split, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


class Taps(Same):
    """Convolution filters `[W, C]` stored as `[C, 1, W]`, concatenated along channels."""

    def shape(self, shapes: Shapes, heads: Heads) -> Shape:
        return (sum(shape[1] for shape in shapes), 1, shapes[0][0])

    def take(self, disk: np.ndarray, part: int, shapes: Shapes, heads: Heads) -> np.ndarray:
        start = sum(shape[1] for shape in shapes[:part])
        return disk[start : start + shapes[part][1], 0].T

    def join(self, parts: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
        return np.concatenate([part.T[:, None] for part in parts])


class Column(Same):
    """A kernel `[D, 1]` stored as a vector (llama.cpp's gate of the shared expert)."""

    def shape(self, shapes: Shapes, heads: Heads) -> Shape:
        return (shapes[0][0],)

    def take(self, disk: np.ndarray, part: int, shapes: Shapes, heads: Heads) -> np.ndarray:
        return disk[:, None]

    def join(self, parts: Sequence[np.ndarray], heads: Heads) -> np.ndarray:
        return parts[0][:, 0]


LAYOUTS = {
    "same": Same(),
    "rows": Rows(),
    "per_head": PerHead(),
    "query_pairs": InterleavedPairs("queries"),
    "key_pairs": InterleavedPairs("keys"),
    "taps": Taps(),
    "column": Column(),
}
