"""A folder of small pictures in three class folders, no two alike."""

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(48):
        path = tmp_path / "pictures" / CLASSES[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 14 + index % 5, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def spec(folder):
    return f"images(path={str(folder)!r}, size=8, held_out=0.2)"
