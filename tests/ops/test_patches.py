"""Patches: the two orders of features, tiles, and fixed 2-D positions."""

import jax
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.ops import patches

pytestmark = pytest.mark.quick
IMAGES = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)


def test_features_of_a_patch_are_in_the_order_channel_row_column():
    x_BTc = np.asarray(patches.patchify(IMAGES, 2))
    assert x_BTc.shape == (2, 6, 12)
    expected = [IMAGES[1, 2 + row, 4 + column, channel] for channel in range(3) for row in (0, 1) for column in (0, 1)]
    np.testing.assert_array_equal(x_BTc[1, 1 * 3 + 2], expected)  # row 1, column 2 of the grid


def test_features_of_an_output_patch_are_in_the_order_row_column_channel():
    x_BTc = np.arange(2 * 6 * 12, dtype=np.float32).reshape(2, 6, 12)
    images = np.asarray(patches.unpatchify(x_BTc, (2, 3), 2))
    assert images.shape == IMAGES.shape
    for row, column, channel in np.ndindex(2, 2, 3):
        feature = (row * 2 + column) * 3 + channel
        np.testing.assert_array_equal(images[:, row::2, column::2, channel], x_BTc[..., feature].reshape(2, 2, 3))


def test_the_orders_differ_by_a_permutation_of_features():
    x_BTc = np.asarray(patches.patchify(IMAGES, 2))
    row_column_channel = x_BTc.reshape(2, 6, 3, 4).swapaxes(2, 3).reshape(2, 6, 12)
    np.testing.assert_array_equal(patches.unpatchify(row_column_channel, (2, 3), 2), IMAGES)


def test_a_patch_of_one_pixel_keeps_raster_order():
    np.testing.assert_array_equal(patches.patchify(IMAGES, 1), IMAGES.reshape(2, 24, 3))


def test_frames_of_a_video_follow_one_another():
    video = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 5))
    x_BTc = patches.patchify(video, 2)
    frames = [patches.patchify(video[:, frame], 2) for frame in range(3)]
    np.testing.assert_array_equal(x_BTc, np.concatenate(frames, 1))
    joined = [patches.unpatchify(frame, (2, 3), 2) for frame in frames]
    np.testing.assert_array_equal(patches.unpatchify(x_BTc, (3, 2, 3), 2), np.stack(joined, 1))
    assert patches.coordinates((3, 2, 3))[7].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(patches.tile_order((3, 2, 3), 1), np.arange(18))


def test_tiles_are_squares():
    order = patches.tile_order((4, 6), 2)
    assert sorted(order) == list(range(24))
    raster = np.arange(24).reshape(4, 6)
    for tile, (row, column) in enumerate(np.ndindex(2, 3)):
        square = raster[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(order[4 * tile : 4 * tile + 4], square.ravel())
    np.testing.assert_array_equal(patches.tile_order((4, 6), 1), np.arange(24))


def test_tiles_of_a_video_are_squares_of_a_frame():
    order_T = patches.tile_order((3, 4, 6), 2)
    of_a_frame = patches.tile_order((4, 6), 2)
    np.testing.assert_array_equal(order_T, np.concatenate([24 * frame + of_a_frame for frame in range(3)]))


def test_positions_are_sines_and_cosines_of_the_column_then_of_the_row():
    table_TD = patches.sincos_2d((3, 5), 8)
    assert table_TD.dtype == np.float32
    for row, column in np.ndindex(3, 5):
        halves = [[np.sin(c), np.sin(c / 100), np.cos(c), np.cos(c / 100)] for c in (column, row)]
        np.testing.assert_allclose(table_TD[row * 5 + column], np.concatenate(halves), rtol=0, atol=6e-8)


def test_traced_coordinates_have_the_positions_of_the_host_s():
    indices = patches.coordinates((16, 16))
    np.testing.assert_array_equal(indices[35], (2, 3))
    traced = jax.jit(lambda coordinates: patches.sincos(coordinates, 32, 0.5))(indices)
    # Angles up to 7.5 are rounded twice, with their frequencies.
    np.testing.assert_allclose(traced, patches.sincos_2d((16, 16), 32, 0.5), rtol=0, atol=2 * 7.5 * 6e-8 + 6e-8)


def test_positions_of_a_crop_are_those_of_the_table_s_centre():
    whole = patches.sincos_2d((10, 10), 8, scale=0.5).reshape(10, 10, 8)
    np.testing.assert_array_equal(patches.sincos_2d((4, 7), 8, 0.5, table=10).reshape(4, 7, 8), whole[3:7, 1:8])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patches.patchify(IMAGES, 4), "embed: patch = 4 does not divide 4 x 6 pixels"),
        (lambda: patches.tile_order((4, 6), 4), "embed: tile = 4 does not divide 4 x 6 tokens"),
        (lambda: patches.sincos_2d((2, 2), 6), "position: sincos2d needs a dim that is a multiple of 4; 6 is none"),
        (lambda: patches.sincos_2d((2, 9), 8, table=8), "position: table = 8 holds no grid of 2 x 9 tokens"),
        (
            lambda: patches.sincos_2d((3, 2, 2), 8, table=8),
            "position: table = 8 holds rows and columns; this grid has 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(UserError) as refused:
        call()
    assert message in str(refused.value) and "\n" not in str(refused.value)
