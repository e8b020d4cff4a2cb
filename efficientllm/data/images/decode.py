"""Image decoding with Pillow: the first frame, upright, on white, cropped to a uint8 array of a bucket's size."""

import hashlib
import io
import os
import typing
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from efficientllm.data import streams
from efficientllm.data.base import MAX_IMAGE_BYTES, Content, Picture
from efficientllm.data.images.buckets import Shape, nearest_bucket
from efficientllm.errors import UserError

MAX_PIXELS = 89_478_485  # above which Pillow warns of a decompression bomb
# Formats whose decoders are Pillow's own: EPS, for one, would run Ghostscript.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# What Pillow warns of is counted here, or does no harm.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unusable(Exception):
    """A picture that is skipped: `reason`, in the plural, and what more is known of this one."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, " ".join(str(detail).split())


def read(picture: Picture) -> typing.Any:
    """Returns the content of a picture: the bytes of an image file, an array, or a PIL image.

    Raises UserError that names a file which cannot be read, Unusable for one that is too large.
    """
    content: typing.Any = picture.content() if callable(picture.content) else picture.content
    if isinstance(content, str | os.PathLike):
        with streams.reading(content), open(content, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_IMAGE_BYTES:
                raise Unusable(f"files of more than {MAX_IMAGE_BYTES >> 20} MiB")
            content = file.read()
    return content


def digest(content: Content) -> bytes:
    """Returns the sha256 of what `read` returned."""
    if isinstance(content, np.ndarray):
        content = f"{content.dtype.str} {content.shape} ".encode() + content.tobytes()
    elif isinstance(content, Image.Image):
        content = f"{content.mode} {content.size} ".encode() + content.tobytes()
    return hashlib.sha256(typing.cast(bytes, content)).digest()


def decode(content: Content, shapes: Sequence[Shape], name: str) -> tuple[int, np.ndarray]:
    """Decodes what `read` returned to the index of its bucket and uint8 of that one's shape `(h, w, C)`.

    Raises Unusable for what is no picture, damaged or too large, and UserError for content of another type.
    """
    _check(content, name)
    image = load(content)
    bucket = nearest_bucket(shapes, image.height, image.width)
    return bucket, to_pixels(image, shapes[bucket])


def to_pixels(image: Image.Image, shape: Shape) -> np.ndarray:
    """Crops an image to uint8 of a shape `(..., h, w, C)`, transparent parts on white."""
    *_, height, width, channels = shape
    return np.asarray(center_crop(convert(image, channels), height, width)).reshape(height, width, channels)


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image to RGB or gray, transparent parts on white."""
    try:
        return _on_white(image).convert("RGB" if channels == 3 else "L")
    except ValueError as error:  # LAB, for one, has no conversion
        raise Unusable("pictures in other colour spaces", error) from None


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes an image until it just covers `height` x `width` and cuts the middle out.

    Squares are those of ADM and DiT: the picture is halved by box averages while it is at least twice as large along
    both sides, then resized bicubically. Raises Unusable for a picture so long that it would be too large after this.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    resized = round(image.width * scale), round(image.height * scale)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise Unusable(f"pictures too long to be cropped to {height} x {width}", f"{image.width} x {image.height}")
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _check(content, name):
    """Raises UserError for content of a type, or an array of a shape, that is no picture."""
    if not isinstance(content, bytes | Image.Image | np.ndarray):
        raise UserError(f"{name}: is of type {type(content).__name__}; bytes, a uint8 array or a PIL image is needed")
    if isinstance(content, np.ndarray):
        shape, is_gray = content.shape, content.ndim == 2
        if content.dtype != np.uint8 or 0 in shape or not (is_gray or content.ndim == 3 and shape[2] in (1, 3, 4)):
            array = f"{name}: is an array {content.dtype} {list(shape)}"
            raise UserError(f"{array}; uint8 [h, w] or [h, w, 1, 3 or 4] is needed")


def load(content: Content) -> Image.Image:
    """Loads the first frame, upright. Raises Unusable for what is no picture, damaged or too large."""
    try:
        image = open_image(content)
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(f"pictures of more than {MAX_PIXELS:,} pixels", f"{image.width} x {image.height}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy would not know its format
        return image
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable(f"pictures of more than {MAX_PIXELS:,} pixels", error) from None
    except Image.UnidentifiedImageError:
        raise Unusable("files that are empty" if content == b"" else "files that are no pictures") from None
    except Exception as error:  # of damaged files Pillow's decoders raise a dozen types, RuntimeError among them
        raise Unusable("damaged pictures", error) from None


def open_image(content: typing.Any) -> Image.Image:
    """Opens an image of one of `FORMATS`, in an array or PIL's, whose frames are not read yet."""
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content), formats=formats())
    if isinstance(content, Image.Image):
        return content.copy()
    return Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)


def formats() -> list[str]:
    """Lists the formats of FORMATS that this Pillow has."""
    Image.init()  # imports every format's decoder, once
    return [name for name in FORMATS if name in Image.OPEN]


def _on_white(image):
    """The picture in 8 bits a channel, transparent parts composited on white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        samples = np.asarray(image, np.int64).clip(0, 65535)
        return Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unusable("pictures of 32-bit samples, whose range is not known", f"mode {image.mode}")
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))
