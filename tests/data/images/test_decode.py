"""Every kind of file becomes the right picture, or is skipped with a reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from efficientllm.data.base import Picture
from efficientllm.data.images import decode
from efficientllm.errors import UserError

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content, size=8, channels=3):
    return decode.decode(content, [(size, size, channels)], "a.png")[1]


def refused(content, size=8):
    with pytest.raises(decode.Unusable) as error:
        pixels(content, size)
    return error.value


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_files_give_their_pixels(kind):
    image = Image.fromarray(GRAY).convert("RGB") if kind == "GIF" else Image.fromarray(NOISE)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encoded(image, kind, **options)), np.asarray(image))


@pytest.mark.parametrize("kind, bound", [("JPEG", 2), ("JPEG2000", 0), ("AVIF", 6)])
def test_other_files_come_close(kind, bound):
    smooth = np.broadcast_to(np.arange(0, 256, 32, dtype=np.uint8)[:, None, None], (8, 8, 3))
    content = encoded(Image.fromarray(np.ascontiguousarray(smooth)), kind, **({"quality": 100} if bound else {}))
    assert np.abs(pixels(content).astype(int) - smooth).max() <= bound


def test_transparent_parts_are_white():
    alpha = GRAY // 2 * 2
    image = Image.fromarray(np.dstack([NOISE, alpha]), "RGBA")
    share = alpha[..., None] / 255
    expected = NOISE * share + 255 * (1 - share)
    assert np.abs(pixels(encoded(image, "PNG")) - expected).max() <= 1
    clear = Image.new("LA", (8, 8), (0, 0))
    assert (pixels(encoded(clear, "PNG")) == 255).all()


def test_the_transparent_colour_of_a_palette_or_of_rgb_is_white():
    for mode in ("P", "L", "RGB"):
        image = Image.new("RGB", (8, 8), (0, 0, 0))
        image.paste((204, 204, 204), (0, 0, 4, 8))  # of the palette
        image = image.convert(mode)
        content = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else image.getpixel((7, 7)))
        shown = pixels(content)
        assert (shown[:, 4:] == 255).all() and np.abs(shown[:, :4].astype(int) - 204).max() <= 1, mode


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.round(deep / 257)
    for kind in ("PNG", "TIFF", "PPM"):
        shown = pixels(encoded(Image.fromarray(deep), kind), channels=1)[..., 0]
        np.testing.assert_array_equal(shown, expected, kind)


def png(width, height, depth, kind, rows):
    """A PNG file by hand."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bits_of_colour_keep_the_upper_eight():
    deep = RNG.integers(0, 65536, (8, 8, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    assert np.abs(pixels(png(8, 8, 16, 2, rows)) - deep / 257).max() <= 1


def test_samples_without_a_known_range_are_skipped():
    for samples in (np.ones((8, 8), np.float32), np.ones((8, 8), np.int32)):
        assert refused(encoded(Image.fromarray(samples), "TIFF")).reason.startswith("pictures of 32-bit samples")


def test_cmyk_becomes_rgb():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red = pixels(content)
    assert red[..., 0].min() > 245 and red[..., 1:].max() < 10


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "HSV", "YCbCr", "CMYK", "RGBX"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_memory_of_every_mode(mode, channels):
    image = Image.fromarray(GRAY).convert("L" if mode == "P" else "RGB").convert(mode)
    shown = pixels(image, channels=channels)
    assert shown.shape == (8, 8, channels) and shown.dtype == np.uint8
    if mode not in ("1", "HSV", "YCbCr"):
        np.testing.assert_array_equal(shown, np.broadcast_to(GRAY[..., None], shown.shape))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(content) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_turns_the_picture(orientation, kind):
    """A corner that is black shows how it was turned; the oracle is the table of the EXIF standard."""
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    stored = np.full((16, 32, 3), 255, np.uint8)
    stored[:8, :16] = 0  # the stored corner at the top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    shown = pixels(encoded(Image.fromarray(stored), kind, exif=exif, **options), size=16)
    dark = [(y, x) for y in (0, -1) for x in (0, -1) if shown[y, x].max() < 40]
    assert dark == [corners[orientation]]


def test_a_turned_picture_is_the_one_that_is_turned_by_hand():
    tall = Image.fromarray(RNG.integers(0, 256, (40, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tall.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(
        pixels(encoded(tall, "PNG", exif=exif), size=8), np.asarray(decode.center_crop(turned, 8, 8))
    )


def test_the_crop_halves_then_resizes_then_cuts_the_middle():
    image = Image.fromarray(RNG.integers(0, 256, (70, 101, 3), dtype=np.uint8))
    by_hand = image.resize((50, 35), Image.Resampling.BOX).resize((25, 17), Image.Resampling.BOX)
    by_hand = by_hand.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))  # 25 * 16 / 17 = 23.5 -> 24
    np.testing.assert_array_equal(decode.center_crop(image, 16, 16), by_hand)


def test_a_picture_of_the_right_size_is_not_touched():
    np.testing.assert_array_equal(pixels(NOISE), NOISE)
    np.testing.assert_array_equal(decode.center_crop(Image.fromarray(NOISE).crop((0, 0, 8, 8)), 8, 8), NOISE)


@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (9, 1), (3, 1000), (31, 32), (16, 33)])
def test_pictures_of_any_sides_become_squares(sides):
    assert pixels(np.full((*sides, 3), 77, np.uint8), size=16).tolist() == np.full((16, 16, 3), 77).tolist()


def test_a_thread_of_a_picture_is_skipped_before_it_is_blown_up():
    assert "too long" in refused(encoded(Image.new("1", (60_000, 1)), "PNG"), size=2048).reason


def test_a_decompression_bomb_is_not_decoded():
    for side in (9_500, 14_000):  # Pillow warns of the one and refuses the other
        assert refused(png(side, side, 1, 0, b"")).reason == "pictures of more than 89,478,485 pixels"


def test_a_bomb_in_a_text_chunk_is_damage():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * (1 << 21), zip=True)
    error = refused(encoded(Image.fromarray(NOISE), "PNG", pnginfo=info))
    assert error.reason == "damaged pictures" and "MAX_TEXT_CHUNK" in error.detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_damage(kind):
    content = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    error = refused(content[: len(content) // 2])
    assert error.reason == "damaged pictures" and error.detail


def test_what_is_no_picture():
    assert refused(b"").reason == "files that are empty"
    assert refused(b"some text\n" * 20).reason == "files that are no pictures"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"  # which Pillow would hand to Ghostscript
    assert refused(postscript).reason == "files that are no pictures"


@pytest.mark.parametrize(
    "content, message",
    [
        (np.zeros((8, 8)), "a.png: is an array float64 [8, 8]; uint8 [h, w] or [h, w, 1, 3 or 4] is needed"),
        (np.zeros((8, 8, 2), np.uint8), "[8, 8, 2]"),
        (np.zeros((0, 8), np.uint8), "[0, 8]"),
        ("text", "a.png: is of type str"),
        (None, "a.png: is of type NoneType"),
    ],
)
def test_content_of_another_type_is_an_error(content, message):
    with pytest.raises(UserError) as error:
        pixels(content)
    assert message in str(error.value)


def test_content_is_read_from_what_it_may_be(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bytes")
    path = tmp_path / "a.png"
    for content in (b"bytes", path, str(path), lambda: path, lambda: b"bytes"):
        assert decode.read(Picture(content)) == b"bytes"
    with pytest.raises(UserError, match="b.png: cannot be read"):
        decode.read(Picture(tmp_path / "b.png"))
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(decode.Unusable, match="files of more than 256 MiB"):
        decode.read(Picture(tmp_path / "large.png"))


def test_the_digest_is_of_the_content_and_its_shape():
    wide, tall = np.zeros((2, 8), np.uint8), np.zeros((8, 2), np.uint8)
    contents = (b"a", b"b", wide, tall, wide + 1, Image.fromarray(wide), Image.fromarray(tall))
    assert len({decode.digest(content) for content in contents}) == len(contents)
    assert decode.digest(NOISE[:, ::-1]) == decode.digest(NOISE[:, ::-1].copy())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_mutated_files_are_decoded_or_skipped(kind):
    """Fuzz: bytes are changed, cut out and doubled."""
    rng = random.Random(kind)
    image = ImageOps.posterize(Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)), 3)
    whole, outcomes = encoded(image, kind), set()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            start = rng.randrange(len(content))
            stop = min(len(content), start + rng.randint(1, 12))
            content[start:stop] = rng.choice([b"", rng.randbytes(stop - start), content[start:stop] * 2])
            content = content or bytearray(b"\0")
        try:
            shown = pixels(bytes(content))
            assert shown.shape == (8, 8, 3) and shown.dtype == np.uint8
            outcomes.add("decoded")
        except decode.Unusable as error:
            assert error.reason and "\n" not in error.detail
            outcomes.add("skipped")
    assert "skipped" in outcomes
