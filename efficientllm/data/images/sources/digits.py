"""Handwritten digits of the package scikit-learn, read from its data file."""

import dataclasses
import importlib.util
import pathlib
import typing

import numpy as np

from efficientllm.data import cache
from efficientllm.data.base import ImageSource, Picture
from efficientllm.errors import FieldError
from efficientllm.registry import register

_SIDE, _WHITE = 8, 16  # pixels of a side, and the largest value


@register("data", "digits")
@dataclasses.dataclass(frozen=True)
class Digits(ImageSource):
    """1,797 digits of 8 x 8 pixels, the test set of UCI's Optical Recognition of Handwritten Digits, white on black.

    `sklearn.datasets.load_digits` has the same; nothing of scikit-learn is imported. Other sizes are interpolated.
    """

    size: int = 8
    channels: int = 3
    held_out: float = 0.05

    classes = tuple("0123456789")

    def key(self) -> str:
        """Changes with the file or a field."""
        return f"{self} {cache.stat_key([_file()])}"

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields the digits in the order of the file."""
        rows = np.loadtxt(_file(), np.int64, delimiter=",")
        values = np.round(rows[:, :-1] * 255 / _WHITE).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
        for place, (pixels, label) in enumerate(zip(values, rows[:, -1].tolist(), strict=True)):
            yield Picture(pixels, label, name=f"digit {place}")


def _file():
    spec = importlib.util.find_spec("sklearn")
    path = spec and pathlib.Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if path is None or not path.exists():
        raise FieldError("data", "digits needs the files of scikit-learn; pip install scikit-learn, or use glyphs()")
    return path
