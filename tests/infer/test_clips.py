"""Samples that are clips: film strips, a grid that moves, and a file of each."""

import numpy as np
import pytest
from PIL import Image

from efficientllm.data.images.clips import read_clip
from efficientllm.infer.clips import FPS, film_strips, write_grids, write_samples
from efficientllm.infer.pictures import BORDER

pytestmark = pytest.mark.quick


@pytest.fixture
def drawn():
    return np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6, 3), np.uint8)


def test_a_film_strip_has_the_frames_from_left_to_right(drawn):
    strips = film_strips(drawn)
    assert strips.shape == (3, 8, 30, 3)
    for frame in range(5):
        np.testing.assert_array_equal(strips[:, :, 6 * frame : 6 * frame + 6], drawn[:, frame])


def test_a_grid_of_clips_stands_and_moves(tmp_path, drawn):
    grid = write_grids(tmp_path, drawn)
    with Image.open(tmp_path / "grid.png") as image:
        np.testing.assert_array_equal(np.asarray(image), grid)
    assert grid.shape == (3 * 8 + 2 * BORDER, 5 * 6, 3)  # one strip below another
    np.testing.assert_array_equal(grid[8 + BORDER : 16 + BORDER], film_strips(drawn)[1])
    moving = read_clip(tmp_path / "grid.webp")
    assert moving.frames.shape == (5, 2 * 8 + BORDER, 2 * 6 + BORDER, 3) and moving.fps == pytest.approx(FPS, rel=0.01)
    np.testing.assert_array_equal(moving.frames[:, :8, 6 + BORDER :], drawn[1])


def test_pictures_have_no_moving_grid(tmp_path, drawn):
    assert write_grids(tmp_path, drawn[:, 0]).shape == (2 * 8 + BORDER, 2 * 6 + BORDER, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_clips_without_pyav_say_so_once(tmp_path, drawn, monkeypatch, caplog):
    import importlib.util

    caplog.set_level("INFO")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else find(name, *rest))
    write_samples(tmp_path, drawn)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000.webp", "001.webp", "002.webp"]
    np.testing.assert_array_equal(read_clip(tmp_path / "002.webp").frames, drawn[2])
    assert caplog.text.count("needs PyAV") == 1
