"""Image data: sources of pictures, decoding, and batches of pixels or of latents.

`ImageData` reads what a data spec names. A source of one's own is derived from `data.base.ImageSource`.
"""

from efficientllm.data.base import ImageSource, Picture
from efficientllm.data.images.image_data import ImageData

KINDS = {"data": "sources"}

__all__ = ["ImageData", "ImageSource", "Picture"]
