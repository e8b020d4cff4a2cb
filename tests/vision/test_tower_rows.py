"""Slots of a tower and rows of tokens: bins of windows, padding, counts that do not fit."""

import jax
import numpy as np
import pytest

from convert import vision_folders as folders
from efficientllm import convert, model
from efficientllm.embeds.vision_language import encode_images
from efficientllm.errors import UserError
from efficientllm.vision.token_rows import Prompt, make_batch, token_row
from efficientllm.vision.tower_rows import tower_rows

pytestmark = pytest.mark.xdist_group("vision")
IMAGE = folders.IMAGE


@pytest.fixture(scope="module")
def lm():
    return convert.open_source(folders.saved("qwen2.5"), weights=False).lm()


def test_a_window_lies_in_one_bin_and_every_patch_once(lm):
    images = folders.pictures("qwen2.5")
    patches, ((*slots,),) = tower_rows(lm.vision, [images])
    bins = patches.windows_BS.reshape(-1, lm.vision.bin)
    bins_of = [set(np.flatnonzero((bins == window).any(1))) for window in range(1, bins.max() + 1)]
    assert all(len(where) == 1 for where in bins_of)
    assert len(bins) < len(bins_of)  # small windows share bins
    frames, windows = patches.frames_BS[0], patches.windows_BS[0]
    assert all(len(set(frames[windows == window])) == 1 for window in range(1, windows.max() + 1))
    taken = np.concatenate(slots)
    assert len(set(taken.tolist())) == len(taken) == sum(picture.tokens for picture in images)
    for picture, places in zip(images, slots, strict=True):  # features are of the groups in raster order
        groups = patches.pixels_BSc[0].reshape(-1, 4, 1176)[places]
        np.testing.assert_array_equal(groups.reshape(-1, 1176), picture.pixels_Pc)
    assert (patches.frames_BS > 0).sum() == (windows > 0).sum() == sum(len(picture.pixels_Pc) for picture in images)


@pytest.mark.slow
def test_padding_and_neighbours_change_nothing(lm):
    """An image alone, and beside others in a longer row, has the same features."""
    images = folders.pictures("qwen2.5")
    params = model.init_params(lm, jax.random.key(0), 8)
    encode = jax.jit(lambda params, patches: encode_images(lm, params, patches))

    def features(rows, row, image, **options):
        laid_out = tower_rows(lm.vision, rows, **options)
        return np.asarray(encode(params, laid_out.patches))[row][laid_out.slots[row][image]]

    alone = features([[images[0]]], 0, 0)
    for rows, row, image in (([[images[0]]], 0, 0), ([[images[2]], [images[1], images[0]]], 1, 1)):
        np.testing.assert_allclose(features(rows, row, image, multiple=512), alone, atol=1e-5)


def test_rows_without_images(lm):
    """Beside rows with images, and in a batch without any."""
    made = make_batch(lm, [Prompt([1, IMAGE], folders.pictures("qwen2.5")[:1]), Prompt([3, 4, 5])])
    assert (made.ctx.images.slots_BT[1] == -1).all() and (made.ctx.images.patches.frames_BS[1] == 0).all()
    assert make_batch(lm, [Prompt([3, 4, 5])], 8).ctx.images is None


def test_image_tokens_are_one_an_image_or_all(lm):
    image = folders.pictures("qwen2.5")[2]
    once = token_row(lm, Prompt([5, IMAGE, 6], [image]))
    every = token_row(lm, Prompt([5, *[IMAGE] * image.tokens, 6], [image]))
    for actual, expected in zip(once, every, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("ids, images", [([5, IMAGE, IMAGE, 6], 1), ([5, 6], 1), ([IMAGE], 0)])
def test_counts_that_differ_are_refused_with_the_record(ids, images, lm):
    with pytest.raises(UserError, match=r"record 3: \d image tokens \(id 190\) and \d images of \d+ tokens; write one"):
        token_row(lm, Prompt(ids, folders.pictures("qwen2.5")[:images], "record 3"))


def test_images_that_the_tower_does_not_read_are_refused():
    lm = convert.open_source(folders.saved("llava"), weights=False).lm()
    with pytest.raises(UserError, match="prepare it with the model's own processor"):
        tower_rows(lm.vision, [folders.pictures("qwen2.5")])
    (tile,) = folders.pictures("llava", [(1, 4, 4)])
    with pytest.raises(UserError, match="an image of 2 x 8 patches: the tower has positions for 4 x 4"):
        tower_rows(lm.vision, [[tile._replace(grid=(1, 2, 8))]])
