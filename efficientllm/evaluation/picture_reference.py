"""Training pictures that samples are compared with, small and cached; the nearest of them to each sample."""

import dataclasses
import typing

import numpy as np

from efficientllm.data import cache
from efficientllm.evaluation import frechet

if typing.TYPE_CHECKING:
    from efficientllm.data.images import ImageData

MOST, SIDE = 10_000, 32  # pictures of a side of the data; pixels of a side of a picture
FORMAT = 1  # of a cache entry
_BLOCK = 2_000  # training pictures compared at a time: 50 MB of pixels in double precision
_YARDSTICKS = 256  # held-out pictures whose nearest training picture is looked for


@dataclasses.dataclass(frozen=True)
class Reference:
    """Pictures of an ImageData, uint8 `[n, h, w, C]` of at most SIDE pixels a side, at most MOST of each side.

    Attributes:
      training, held_out: the pictures; with more than MOST of them, evenly spaced ones. Of data in buckets those of the
        largest bucket, in whose size samples are drawn.
      indices: of the training pictures in `data.pictures`.
      labels, held_out_labels: int32 `[n]`.
      flipped: whether the mirror images are trained on too.
    """

    training: np.ndarray
    held_out: np.ndarray
    indices: np.ndarray
    labels: np.ndarray
    held_out_labels: np.ndarray
    flipped: bool

    def __len__(self) -> int:
        return len(self.training)


class Nearest(typing.NamedTuple):
    """The training picture nearest to each sample: index in `data.pictures`, whether mirrored, and the root mean square
    of the differences of pixels (0 to 255)."""

    indices: np.ndarray
    mirrored: np.ndarray
    distances: np.ndarray


def load_reference(data: "ImageData") -> Reference:
    """Reads the pictures that samples are compared with, or their cache entry. Raises UserError as `data` does."""
    pictures = data.pictures
    name = f"reference-{cache.digest(FORMAT, pictures.summary['fingerprint'], MOST, SIDE)}"
    folder = cache.entry(data.cache, name, lambda new: _write(data, new))
    training, held_out = (np.load(folder / f"{side}.npy") for side in ("train", "held_out"))
    indices = {side: _evenly(data.sampled_indices(side)) for side in ("train", "held_out")}
    labels, held_out_labels = (np.asarray(pictures.labels[indices[side]]) for side in ("train", "held_out"))
    return Reference(training, held_out, indices["train"], labels, held_out_labels, flipped=bool(data.source.flip))


def shrink(images_BhwC: np.ndarray) -> np.ndarray:
    """Averages pictures (uint8 `[B, h, w, C]`) over boxes to at most SIDE pixels a side."""
    from PIL import Image

    _, h, w, C = images_BhwC.shape
    if max(h, w) <= SIDE:
        return images_BhwC

    def shrink_image(image_hwC):
        image = Image.fromarray(image_hwC[..., 0] if C == 1 else image_hwC)
        return np.asarray(image.resize((min(w, SIDE), min(h, SIDE)), Image.Resampling.BOX)).reshape(-1, min(w, SIDE), C)

    return np.stack([shrink_image(image_hwC) for image_hwC in images_BhwC])


def find_nearest(images_BhwC: np.ndarray, reference: Reference) -> Nearest:
    """Finds the training picture nearest to each picture (uint8 `[B, h, w, C]`) by the pixels of both, shrunk."""
    rows = shrink(images_BhwC).reshape(len(images_BhwC), -1)
    best = Nearest(*(np.zeros(len(rows), dtype) for dtype in (np.int64, bool)), np.full(len(rows), np.inf))
    for mirrored in (False, True)[: 1 + reference.flipped]:
        for start in range(0, len(reference), _BLOCK):
            block = reference.training[start : start + _BLOCK]
            places, distances = frechet.nearest(rows, block[:, :, ::-1] if mirrored else block)
            closer = distances / np.sqrt(rows.shape[1]) < best.distances
            best.indices[closer] = reference.indices[start + places[closer]]
            best.mirrored[closer], best.distances[closer] = mirrored, distances[closer] / np.sqrt(rows.shape[1])
    return best


def unseen_distance(reference: Reference) -> float | None:
    """Returns the median distance of held-out pictures from the nearest training picture; None without any."""
    held_out = reference.held_out[:_YARDSTICKS]
    return float(np.median(find_nearest(held_out, reference).distances)) if len(held_out) else None


def read_pictures(data: "ImageData", nearest: Nearest) -> np.ndarray:
    """Reads the nearest training pictures at their full size, uint8 `[B, h, w, C]`, mirrored where that was nearest."""
    pictures = [data.pictures[int(index)] for index in nearest.indices]
    mirrored = zip(pictures, nearest.mirrored, strict=True)
    return np.stack([picture[:, ::-1] if is_mirrored else picture for picture, is_mirrored in mirrored])


def _evenly(indices):
    """At most MOST of the indices, evenly spaced."""
    return indices if len(indices) <= MOST else indices[np.arange(MOST) * len(indices) // MOST]


def _write(data, folder):
    for side in ("train", "held_out"):
        indices = _evenly(data.sampled_indices(side))
        *_, h, w, C = data.used_shapes[0]
        shape = min(h, SIDE), min(w, SIDE), C
        small = [shrink(data.pictures[int(index)][None])[0] for index in indices]
        np.save(folder / f"{side}.npy", np.stack(small) if small else np.zeros((0, *shape), np.uint8))
