"""Sizes of pictures from their headers, so that rows can be laid out before a pixel is decoded."""

import io
import os
import typing

import numpy as np

from efficientllm.data.base import MAX_IMAGE_BYTES
from efficientllm.errors import UserError

_ORIENTATION = 0x0112  # of EXIF; 5 to 8 lie on their side
_SIDEWAYS = (5, 6, 7, 8)


def picture_size(content: typing.Any, name: str) -> tuple[int, int]:
    """Returns height and width of a picture as `processors.load_picture` gives it, upright.

    Raises UserError, beginning with the record's `name`, for what is no picture, and for one that `load_picture` would
    find too large.
    """
    from PIL import Image

    from efficientllm.data.images import decode

    content = content() if callable(content) else content
    if isinstance(content, np.ndarray):
        return content.shape[0], content.shape[1]
    if isinstance(content, Image.Image):
        return content.height, content.width
    try:
        width, height, sideways = _header(content, Image, decode.formats())
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: cannot be read as a picture: no known format; give another one") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name}: {_too_many(decode.MAX_PIXELS)}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as a picture ({error}); give another one") from None
    if width * height > decode.MAX_PIXELS:
        raise UserError(f"{name}: a picture of {width} x {height} pixels: {_too_many(decode.MAX_PIXELS)}")
    return (width, height) if sideways else (height, width)


def _header(content, library, formats):
    """Width, height, and whether the picture lies on its side; without its pixels."""
    if isinstance(content, str | os.PathLike) and os.path.getsize(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"files of more than {MAX_IMAGE_BYTES >> 20} MiB are not read")
    file = content if isinstance(content, str | os.PathLike) else io.BytesIO(content)
    with library.open(file, formats=formats) as image:
        return *image.size, image.getexif().get(_ORIENTATION) in _SIDEWAYS


def _too_many(limit):
    return f"pictures of more than {limit:,} pixels are not read; shrink it"
