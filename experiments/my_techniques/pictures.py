"""Data source of images: disks and squares of random colours."""

import dataclasses

import numpy as np

from efficientllm.data import ImageSource, Picture
from efficientllm.registry import register


@register("data", "shapes")
@dataclasses.dataclass(frozen=True)
class Shapes(ImageSource):
    """A picture is a uint8 array here; it may be the path of a file, or what `Picture` lists."""

    size: int = 32
    count: int = 500
    held_out: float = 0.1

    classes = ("disk", "square")

    def pictures(self):
        rng, (row, column) = np.random.default_rng(0), np.mgrid[: self.size, : self.size]
        for index in range(self.count):
            (y, x), radius = rng.uniform(0.3, 0.7, 2) * self.size, rng.uniform(0.1, 0.3) * self.size
            across = np.hypot(row - y, column - x) if index % 2 else np.maximum(abs(row - y), abs(column - x))
            inside = across < radius
            yield Picture(np.where(inside[..., None], rng.integers(0, 256, 3), 0).astype(np.uint8), 1 - index % 2)
