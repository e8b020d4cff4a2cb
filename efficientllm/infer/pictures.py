"""Pictures of arrays: uint8 values, a grid of them, and PNG files."""

import math

import numpy as np

from efficientllm.errors import UserError
from efficientllm.runtime.atomic_write import replacing
from efficientllm.runtime.optional_packages import remedy
from efficientllm.typing import PathLike


def images_to_uint8(images_BhwC: np.ndarray) -> np.ndarray:
    """Converts values in [-1, 1] to uint8, `clamp(127.5 y + 128)` truncated, as DiT's reference does.

    NaN becomes 0.
    """
    scaled = np.clip(127.5 * np.asarray(images_BhwC, np.float32) + 128, 0, 255)
    return np.nan_to_num(scaled).astype(np.uint8)


BORDER = 2  # white pixels between the pictures of a grid


def image_grid(images_BhwC: np.ndarray, columns: int = 0, border: int = BORDER) -> np.ndarray:
    """Arranges pictures in rows of `columns`, white lines of `border` pixels between; by default about a square.

    Returns uint8 `[height, width, C]`. Places that are left over are white.
    """
    B, h, w, C = images_BhwC.shape
    columns = columns or grid_columns(B)
    rows = -(-B // columns)
    grid = np.full((rows * (h + border) - border, columns * (w + border) - border, C), 255, np.uint8)
    for index, image_hwC in enumerate(images_BhwC):
        top, left = (index // columns) * (h + border), (index % columns) * (w + border)
        grid[top : top + h, left : left + w] = image_hwC
    return grid


def grid_columns(count: int) -> int:
    """Returns the columns of a grid of `count` pictures that is about a square."""
    return math.ceil(math.sqrt(count))


def write_png(file: PathLike, image_hwC: np.ndarray) -> None:
    """Writes a picture of one (grey) or three (RGB) channels. Raises UserError without Pillow, and for others."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"{file}: a picture needs Pillow; {remedy('images')}") from None
    if image_hwC.shape[-1] not in (1, 3):
        raise UserError(f"{file}: {image_hwC.shape[-1]} channels are no picture; decode latents first")
    with replacing(file) as temporary:
        Image.fromarray(image_hwC[..., 0] if image_hwC.shape[-1] == 1 else image_hwC).save(temporary, format="PNG")
