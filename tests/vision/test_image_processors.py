"""Image processors against transformers' Pillow processors, bit for bit; files that are no good pictures."""

import io
import json

import numpy as np
import pytest

from convert import vision_folders as folders
from efficientllm import convert
from efficientllm.convert.check_vision import draw_picture, reference_pixels
from efficientllm.errors import UserError
from efficientllm.vision.processors import load_picture, read_processor
from efficientllm.vision.resize_rules import rounded_size, shortest_edge_size, tile_grid

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("vision")

SIZES = [(37, 90), (200, 60), (56, 56), (300, 301), (10, 10)]
KINDS = {
    "qwen2.5": ("Qwen2VLImageProcessorPil", {"size": {"shortest_edge": 3136, "longest_edge": 50_000}}),
    "llava": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
    "internvl": (
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 6}
        | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ),
}


smart_resize = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.smart_resize


def lm_of(name):
    return convert.open_source(folders.saved(name), weights=False).lm()


def processor_of(name, folder, **changes):
    (folder / "preprocessor_config.json").write_text(json.dumps(KINDS[name][1] | changes))
    return read_processor(folder, lm_of(name))


@pytest.mark.parametrize("name", KINDS)
def test_patches_are_those_of_transformers(name, tmp_path):
    kind, values = KINDS[name]
    theirs, ours, lm = getattr(transformers, kind)(**values), processor_of(name, tmp_path), lm_of(name)
    random = np.random.default_rng(0)
    for height, width in SIZES:
        image = draw_picture(height, width, random)
        expected, picture = theirs([image], return_tensors="np"), ours.prepare(image)
        actual = {key: value.numpy() for key, value in reference_pixels(lm, [picture]).items()}
        for key in actual:
            np.testing.assert_array_equal(actual[key], expected[key], err_msg=f"{key} of {height} x {width}")
        assert ours.tokens(height, width) == picture.tokens


@pytest.mark.parametrize(
    "size, limit, expected",
    [
        ((1000, 1000), 12_845_056, (1008, 1008)),
        ((300, 500), 12_845_056, (308, 504)),
        ((480, 640), 12_845_056, (476, 644)),
        ((2000, 3000), 12_845_056, (1988, 2996)),
        ((2000, 3000), 589_824, (616, 924)),
        ((10, 10), 12_845_056, (56, 56)),
        ((14, 2000), 12_845_056, (28, 672)),
    ],
)
def test_sizes(size, limit, expected):
    """Sides are rounded half to even, then grow or shrink to the limits."""
    assert rounded_size(*size, 28, 3136, limit) == smart_resize(*size, 28, 3136, limit) == expected
    assert np.prod(expected) <= limit


def test_a_picture_that_is_too_long_is_refused():
    with pytest.raises(UserError, match=r"3000 x 10 pixels: the longer side is over 200 times the shorter; crop it"):
        rounded_size(10, 3000, 28, 3136, 10**6)
    with pytest.raises(UserError, match=r"10 x 3000 pixels"):
        shortest_edge_size(3000, 10, 336)


def test_grids_of_tiles():
    assert tile_grid(448, 448, 448, 1, 12) == (1, 1)
    assert tile_grid(448, 896, 448, 1, 12) == (2, 1)
    assert tile_grid(2000, 2000, 448, 1, 12) == (3, 3)  # of squares the one with the most tiles
    assert tile_grid(100, 5000, 448, 1, 12) == (12, 1)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_of_every_mode_are_rgb_upright_and_on_white(tmp_path):
    base = draw_picture(6, 4, np.random.default_rng(0))
    clear = base.copy()
    clear.putalpha(0)
    assert (np.asarray(load_picture(encoded(clear), "a")) == 255).all()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees
    upright = load_picture(encoded(base, exif=rotated.tobytes()), "a")
    assert upright.size == (6, 4)
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(base.transpose(Image.Transpose.ROTATE_270)))
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "TIFF")):
        picture = load_picture(encoded(base.convert(mode), kind), "a")
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(base.convert(mode).convert("RGB")))
    frames = [Image.new("RGB", (5, 5), color) for color in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_picture(moving, "a"))[0, 0].tolist() == [255, 0, 0]
    (tmp_path / "a.png").write_bytes(encoded(base))
    np.testing.assert_array_equal(np.asarray(load_picture(tmp_path / "a.png", "a")), np.asarray(base))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "record 7: files that are empty are not read; give another picture"),
        (b"no picture", "record 7: files that are no pictures are not read"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "record 7: damaged pictures are not read"),
        (encoded(Image.new("1", (20_000, 20_000))), "record 7: pictures of more than 89,478,485 pixels"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "record 7: pictures of 32-bit samples"),
    ],
)
def test_what_is_no_picture_is_named(content, message):
    with pytest.raises(UserError) as refused:
        load_picture(content, "record 7")
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("qwen2.5", {"patch_size": 16}, "patch_size = 16: the model's processor has 14"),
        ("qwen2.5", {"do_resize": False}, "do_resize = False: the model's processor has True"),
        ("qwen2.5", {"max_pixels": -1}, "max_pixels = -1: must be a positive number"),
        ("llava", {"crop_size": 112}, "crop_size = 112: the model's processor has 56"),
        ("llava", {"do_pad": True}, "do_pad = True: the model's processor has False"),
        ("internvl", {"image_mean": [0.5]}, "image_mean = .*: must be three numbers"),
    ],
)
def test_a_processor_of_another_model_is_refused(name, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        processor_of(name, tmp_path, **changes)


def test_limits_of_either_generation_of_files(tmp_path):
    """And the file of transformers 5, which holds all processors."""
    old = {"size": None, "min_pixels": 3136, "max_pixels": 9000}
    assert processor_of("qwen2.5", tmp_path, **old).max_pixels == 9000
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": KINDS["qwen2.5"][1]}))
    assert read_processor(tmp_path, lm_of("qwen2.5")).max_pixels == 50_000
