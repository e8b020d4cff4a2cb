"""How parts of ours lie in a tensor on disk: named operations on numpy arrays, each with its inverse.

Reading gives views wherever numpy can, so that a slice of a part touches little more than its own bytes.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Heads:
    """What layouts that know heads are told: how many there are of queries and of keys."""

    queries: int = 0
    keys: int = 0


def flipped(x):
    """The last two axes exchanged; a vector as it is."""
    return x.swapaxes(-1, -2) if x.ndim > 1 else x


def _flipped_shape(shape):
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else tuple(shape)


class Same:
    """One part, stored as it is."""

    def shape(self, shapes, heads):
        """The shape on disk of parts of `shapes`."""
        return tuple(shapes[0])

    def take(self, disk, part, shapes, heads):
        """Part number `part` of a tensor on disk."""
        return disk

    def join(self, parts, heads):
        """The tensor on disk that the parts make."""
        return parts[0]


class Rows(Same):
    """Kernels `[..., in, out]` as `[..., out, in]`, and vectors, one part below the other."""

    def shape(self, shapes, heads):
        flat = [_flipped_shape(shape) for shape in shapes]
        axis = -2 if len(flat[0]) > 1 else -1
        whole = list(flat[0])
        whole[axis] = sum(shape[axis] for shape in flat)
        return tuple(whole)

    def take(self, disk, part, shapes, heads):
        sizes = [shape[-1] for shape in shapes]
        start = sum(sizes[:part])
        return flipped(
            disk[..., start : start + sizes[part], :] if disk.ndim > 1 else disk[start : start + sizes[part]]
        )

    def join(self, parts, heads):
        flat = [flipped(part) for part in parts]
        return np.concatenate(flat, -2 if flat[0].ndim > 1 else -1) if len(flat) > 1 else flat[0]


class PerHead(Rows):
    """Rows `[heads, parts, width]`: each head's parts below each other (GPT-NeoX's query_key_value)."""

    def take(self, disk, part, shapes, heads):
        split = disk.reshape(heads.queries, len(shapes), -1, *disk.shape[1:])[:, part]
        return flipped(split.reshape(-1, *disk.shape[1:]))

    def join(self, parts, heads):
        flat = [flipped(part) for part in parts]
        split = [part.reshape(heads.queries, 1, -1, *part.shape[1:]) for part in flat]
        return np.concatenate(split, 1).reshape(-1, *flat[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class Pairs(Rows):
    """Rows of a head in the order of neighbours that turn together (0, K/2, 1, K/2 + 1, ...), as llama.cpp stores
    Llama's queries and keys; ours turns the halves. `of` names the heads' count."""

    of: str

    def take(self, disk, part, shapes, heads):
        return flipped(self._exchanged(disk, (getattr(heads, self.of), -1, 2)))

    def join(self, parts, heads):
        return self._exchanged(flipped(parts[0]), (getattr(heads, self.of), 2, -1))

    def _exchanged(self, x, split):
        return x.reshape(*split, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


class Taps(Same):
    """Filters `[W, C]` as `[C, 1, W]`, one part's channels below the other's."""

    def shape(self, shapes, heads):
        return (sum(shape[1] for shape in shapes), 1, shapes[0][0])

    def take(self, disk, part, shapes, heads):
        start = sum(shape[1] for shape in shapes[:part])
        return disk[start : start + shapes[part][1], 0].T

    def join(self, parts, heads):
        return np.concatenate([part.T[:, None] for part in parts])


class Column(Same):
    """A kernel `[D, 1]` as a vector (llama.cpp's gate of the shared expert)."""

    def shape(self, shapes, heads):
        return (shapes[0][0],)

    def take(self, disk, part, shapes, heads):
        return disk[:, None]

    def join(self, parts, heads):
        return parts[0][:, 0]


LAYOUTS = {
    "same": Same(),
    "rows": Rows(),
    "per_head": PerHead(),
    "query_pairs": Pairs("queries"),
    "key_pairs": Pairs("keys"),
    "taps": Taps(),
    "column": Column(),
}
