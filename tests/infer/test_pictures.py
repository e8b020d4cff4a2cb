"""uint8 values, grids and PNG files."""

import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.infer import pictures

pytestmark = pytest.mark.quick


def test_values_are_those_of_the_reference():
    """clamp(127.5 y + 128) cut to whole numbers: -1 is 0.5, 0 is 128, 1 is 255.5."""
    values = np.array([-2.0, -1.0, -0.996, 0.0, 0.5, 1.0, 9.0, np.nan])
    assert pictures.images_to_uint8(values).tolist() == [0, 0, 1, 128, 191, 255, 255, 0]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pictures.images_to_uint8(every / 127.5 - 1), every)


def test_a_grid_has_rows_of_pictures_and_white_between():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((5, 2, 3, 3), np.uint8)
    grid = pictures.image_grid(images, border=1)
    assert grid.shape == (2 * 2 + 1, 3 * 3 + 2, 3)
    assert grid[0, ::4, 0].tolist() == [0, 1, 2] and grid[3, ::4, 0].tolist() == [3, 4, 255]
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all()
    assert pictures.image_grid(images, columns=5, border=0).shape == (2, 15, 3)


@pytest.mark.parametrize("channels", (1, 3))
def test_a_png_holds_the_picture(tmp_path, channels):
    image_module = pytest.importorskip("PIL.Image")
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    pictures.write_png(tmp_path / "a.png", image)
    read = np.asarray(image_module.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(read, image[..., 0] if channels == 1 else image)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_latents_are_no_picture(tmp_path):
    pytest.importorskip("PIL.Image")
    with pytest.raises(UserError, match="4 channels are no picture; decode latents first"):
        pictures.write_png(tmp_path / "a.png", np.zeros((2, 2, 4), np.uint8))
    assert not list(tmp_path.iterdir())
