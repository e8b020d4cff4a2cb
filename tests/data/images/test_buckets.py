"""Buckets of aspect ratios and frame counts: which one a picture is in, its crop, and batches of one bucket each."""

import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from efficientllm.data.images import ImageData, buckets, decode
from efficientllm.data.images.latents import to_float
from efficientllm.errors import UserError
from efficientllm.infer.clips import write_clip
from efficientllm.registry import build

pytestmark = pytest.mark.quick
SIZES = [(16, 20), (24, 12), (12, 24), (13, 30), (40, 17), (16, 16)]  # (height, width)


@pytest.fixture
def folder(tmp_path):
    """Sixty pictures of six sizes, in turn."""
    draw, root = np.random.default_rng(0), tmp_path / "pictures"
    root.mkdir()
    for index, size in zip(range(60), itertools.cycle(SIZES), strict=False):
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(root / f"{index:02}.png")
    return root


def spec_of(folder, fields="size=12, buckets=3, flip=False"):
    return f"images(path={str(folder)!r}, labels='none', held_out=0.3, {fields})"


def opened(spec, **options):
    """Data whose tokens are squares of four pixels."""
    return ImageData(spec, multiple=4, **options)


def shapes_of(spec, multiple=4):
    return buckets.bucket_shapes(build("data", spec), multiple)


@pytest.mark.parametrize("size, count, multiple", [(512, 7, 16), (1024, 9, 64), (480, 4, 16), (12, 3, 4)])
def test_sizes_have_about_one_area_and_aspects_from_one_half_to_two(size, count, multiple):
    shapes = shapes_of(f"images(path='a', size={size}, buckets={count})", multiple)
    assert len(shapes) == count
    for index, (h, w, _) in enumerate(shapes):
        aspect = 2 ** (2 * index / (count - 1) - 1)
        assert h % multiple == w % multiple == 0
        assert abs(w - size * aspect**0.5) <= multiple / 2 and abs(h - size * aspect**-0.5) <= multiple / 2
    assert count % 2 == 0 or shapes[count // 2][:2] == (size, size)


def test_one_bucket_is_a_square_and_sizes_may_be_named():
    assert shapes_of("images(path='a', size=8)") == ((8, 8, 3),)
    assert shapes_of("images(path='a', buckets=((8, 12), (16, 4)), channels=1)") == ((8, 12, 1), (16, 4, 1))
    clips = "videos(path='a', size=8, buckets=((8, 8), (4, 8)), frames=9, shorter=(5, 1))"
    assert shapes_of(clips) == tuple((frames, *size, 3) for frames in (1, 5, 9) for size in ((8, 8), (4, 8)))


def test_a_picture_is_in_the_bucket_nearest_in_aspect():
    """Of aspects 1/2, 1 and 2 the borders are at their geometric means."""
    shapes = shapes_of("images(path='a', size=12, buckets=3)")
    assert [shape[:2] for shape in shapes] == [(16, 8), (12, 12), (8, 16)]
    for height, width in itertools.product(range(1, 60, 3), range(1, 60, 4)):
        expected = 0 if 2 * width**2 < height**2 else 2 if width**2 > 2 * height**2 else 1
        assert buckets.nearest_bucket(shapes, height, width) == expected, (height, width)


def test_a_clip_is_in_the_bucket_of_the_most_frames_that_it_has():
    shapes = shapes_of("videos(path='a', size=12, buckets=3, frames=9, shorter=(1, 5))")
    for frames in range(12):
        bucket = buckets.nearest_bucket(shapes, 10, 30, frames)
        assert (
            bucket == -1
            if frames == 0
            else shapes[bucket] == ((frames - 1) // 4 * 4 + 1 if frames < 9 else 9, 8, 16, 3)
        )


def test_a_crop_is_the_middle_of_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 22, 3), np.uint8)
    shapes = [(8, 16, 3), (16, 8, 3)]
    bucket, shown = decode.decode(pixels, shapes, "a")
    np.testing.assert_array_equal(shown, pixels[:, 3:19])  # cut at both sides
    bucket, shown = decode.decode(np.repeat(np.repeat(pixels, 2, 0), 2, 1), shapes, "a")
    np.testing.assert_array_equal(shown, pixels[:, 3:19])  # halved, then cut
    bucket, shown = decode.decode(pixels.swapaxes(0, 1), shapes, "a")
    assert bucket == 1
    np.testing.assert_array_equal(shown, pixels.swapaxes(0, 1)[3:19])


def test_pictures_are_of_their_buckets_and_the_split_is_that_of_squares(folder):
    read, squares = opened(spec_of(folder)), opened(spec_of(folder, "size=12"))
    expected = [1, 0, 2, 2, 0, 1]
    assert read.pictures.buckets.tolist() == [expected[index % 6] for index in range(60)]
    for index in (1, 7, 59):
        assert read.pictures[index].shape == read.shapes[read.pictures.buckets[index]]
    file = folder / "01.png"  # 24 x 12, as 16 x 8 is
    image = Image.open(file).resize((8, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(read.pictures[1], np.asarray(image))
    np.testing.assert_array_equal(read.pictures.is_held_out, squares.pictures.is_held_out)
    held_out, train = (set(read.pictures.contents[read.indices(side)].tolist()) for side in ("held_out", "train"))
    assert held_out and train and not held_out & train
    assert read.pictures.summary["fingerprint"] != squares.pictures.summary["fingerprint"]


def test_the_log_and_the_row_count_the_pictures_of_buckets(folder, caplog):
    read = opened(spec_of(folder))
    counted = read.describe()["buckets"]
    assert [bucket["size"] for bucket in counted] == ["12 x 12", "16 x 8", "8 x 16"]
    for bucket, index in zip(counted, (1, 0, 2), strict=True):
        held_out = read.pictures.is_held_out[read.pictures.buckets == index]
        assert (bucket["train_images"], bucket["held_out_images"]) == ((~held_out).sum(), held_out.sum())
    first, *lines = read.notes()[:4]
    assert first.startswith("60 pictures in 3 buckets")
    assert lines[0] == f"bucket 12 x 12: 20 pictures, {counted[0]['held_out_images']} of them held out"
    with caplog.at_level(logging.INFO, "efficientllm"):
        read.train(8, 0).close()
    rows = 8 * sum(-(-bucket["train_images"] // 8) for bucket in counted)
    padding = rows - sum(bucket["train_images"] for bucket in counted)
    assert f"an epoch is {rows // 8} batches of one bucket each; {padding} of their rows fill up" in caplog.text


def epochs(batches, count, length):
    """`count` epochs of `length` batches, `[(identities without padding, shape)]` each."""
    taken = [[next(batches) for _ in range(length)] for _ in range(count)]
    return [
        [(batch["identity"][batch["weights"] > 0].tolist(), batch["images"].shape) for batch in epoch]
        for epoch in taken
    ]


def test_each_picture_is_seen_once_an_epoch_in_batches_of_one_bucket(folder):
    read = opened(spec_of(folder))
    of_train = read.indices("train")
    counts = np.bincount(read.pictures.buckets[of_train])
    length = sum(-(-count // 8) for count in counts.tolist())
    batches = read.train(8, 3)
    first, second = epochs(batches, 2, length)
    batches.close()
    identities = np.uint64(0xFFFFFFFF) & read.pictures.contents
    bucket_of = dict(zip(identities.tolist(), read.pictures.buckets.tolist(), strict=True))
    for epoch in (first, second):
        assert sorted(itertools.chain(*(rows for rows, _ in epoch))) == sorted(identities[of_train].tolist())
        for rows, shape in epoch:
            assert rows and {read.shapes[bucket_of[row]] for row in rows} == {shape[1:]}
        sizes = {shape: sorted(len(rows) for rows, of in epoch if of == shape) for _, shape in epoch}
        assert all(set(counts[1:]) <= {8} for counts in sizes.values())  # one of a bucket's is not full, at most
    assert first != second and [shape for _, shape in first] != [shape for _, shape in second]


def test_padding_is_zeros_without_weight(folder):
    read = opened(spec_of(folder))
    batches = read.train(32, 0)
    batch = next(batches)
    batches.close()
    padding = batch["weights"] == 0
    assert padding.sum() and not batch["identity"][padding].any()
    np.testing.assert_array_equal(batch["images"][padding], to_float(np.zeros_like(batch["images"][padding], np.uint8)))


def test_batches_resume_bit_for_bit(folder):
    data = opened(spec_of(folder, "size=12, buckets=3"))
    batches = data.train(8, 5)
    for _ in range(9):  # into the second epoch
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(12)]
    batches.close()
    again = opened(spec_of(folder, "size=12, buckets=3")).train(8, 5)
    again.set_state(state)
    for batch in expected:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])
    again.close()


def test_processes_share_a_batch(folder):
    data = opened(spec_of(folder))
    whole, *parts = (data.train(8, 1), *(data.train(8, 1, index, 2) for index in (0, 1)))
    for _ in range(10):
        batch, shares = next(whole), [next(part) for part in parts]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([share[name] for share in shares]))
    for iterator in (whole, *parts):
        iterator.close()


def test_held_out_pictures_are_evaluated_once_over_all_buckets(folder):
    read = opened(spec_of(folder))
    batches = list(read.held_out(4))
    seen = list(itertools.chain(*(batch["identity"][batch["weights"] > 0].tolist() for batch in batches)))
    identities = np.uint64(0xFFFFFFFF) & read.pictures.contents[read.indices("held_out")]
    assert sorted(seen) == sorted(identities.tolist()) and len(batches) == len(read.held_out(4))
    limited = [batch["images"].shape for batch in read.held_out(4, limit=1)]
    assert len(limited) == len(set(limited)) == len(set(read.pictures.buckets[read.indices("held_out")].tolist()))


def test_latents_are_cached_for_each_bucket(folder):
    shapes = []

    def encode(images_BhwC):
        shapes.append(images_BhwC.shape)
        B, h, w, C = images_BhwC.shape
        mean = images_BhwC.reshape(B, h // 2, 2, w // 2, 2, C).mean((2, 4))
        return mean, mean - 3

    spec = spec_of(folder, "size=12, buckets=3")  # mirrored, some of them
    data, pixels = opened(spec, encode=encode, encode_key="sha"), opened(spec)
    batches, expected = data.train(8, 0), pixels.train(8, 0)
    for _ in range(12):
        latents, images_BhwC = next(batches), next(expected)["images"]
        B, h, w, C = images_BhwC.shape
        weights = latents["weights"][:, None, None, None]
        mean = images_BhwC.reshape(B, h // 2, 2, w // 2, 2, C).mean((2, 4)) * weights
        np.testing.assert_allclose(latents["images"], mean, atol=1e-6)
    batches.close(), expected.close()
    assert set(shapes) == {(16, *shape) for shape in data.shapes} and data.image_shape == (6, 6, 3)
    count = len(shapes)
    again = opened(spec, encode=encode, encode_key="sha")
    assert len(again.latents) == 3 and len(shapes) == count


def test_clips_of_several_frame_counts(tmp_path):
    draw = np.random.default_rng(0)
    for index in range(20):
        size = (8, 16) if index % 2 else (16, 8)
        write_clip(tmp_path / f"{index:02}.webp", draw.integers(0, 256, (1 + index % 7, *size, 3), np.uint8), 8)
    fields = "size=12, frames=5, shorter=(3,), buckets=((16, 8), (8, 16)), labels='none', held_out=0.2"
    read = ImageData(f"videos(path={str(tmp_path)!r}, {fields})", multiple=4)
    frames = [1 + index % 7 for index in range(20)]
    wide = [index % 2 for index in range(20)]
    expected = [2 * (count >= 5) + is_wide for count, is_wide in zip(frames, wide, strict=True) if count >= 3]
    assert read.pictures.buckets.tolist() == expected
    assert read.shapes == ((3, 16, 8, 3), (3, 8, 16, 3), (5, 16, 8, 3), (5, 8, 16, 3))
    assert any("clips of fewer than 3 frames" in note for note in read.notes())
    assert {batch["images"].shape[1:] for batch in read.held_out(2)} <= set(read.shapes)


@pytest.mark.parametrize(
    "fields, message",
    [
        ("buckets=0", "buckets = 0: must be from 1 to 64, or a tuple of sizes"),
        ("buckets=()", r"buckets = \(\): is empty; write \(\(height, width\), ...\)"),
        ("buckets=(8, 8)", "buckets: 8 is no size"),
        ("buckets=((8, 10),)", "buckets: a side = 10: is no multiple of the 4 pixels of a token; write 8 or 12"),
        ("size=10, buckets=3", "size = 10: is no multiple of the 4 pixels of a token; write 8 or 12"),
        ("buckets=True", "buckets = True: must be int or tuple"),
    ],
)
def test_bad_buckets_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        opened(f"images(path='a', {fields})")


@pytest.mark.parametrize("shorter", ["(17,)", "(0,)", "('a',)"])
def test_bad_frame_counts_are_one_line(shorter):
    with pytest.raises(UserError, match="shorter = .*must be .*(1 to 16, below frames = 17|at least 1)"):
        opened(f"videos(path='a', shorter={shorter})")
