"""Sizes of pictures from their headers, so that rows can be laid out before a pixel is decoded."""

import io
import os
import typing

import numpy as np

from efficientllm.errors import UserError

_ORIENTATION = 0x0112  # of EXIF; 5 to 8 lie on their side
_SIDEWAYS = (5, 6, 7, 8)


def picture_size(content: typing.Any, name: str) -> tuple[int, int]:
    """Returns height and width of a picture as `processors.load_picture` gives it, upright.

    Raises UserError, beginning with the record's `name`, for what is no picture.
    """
    from PIL import Image

    content = content() if callable(content) else content
    if isinstance(content, np.ndarray):
        return content.shape[0], content.shape[1]
    if isinstance(content, Image.Image):
        return content.height, content.width
    try:
        with Image.open(content if isinstance(content, str | os.PathLike) else io.BytesIO(content)) as image:
            width, height = image.size
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be read as a picture ({error}); give another one") from None
    return (width, height) if sideways else (height, width)
