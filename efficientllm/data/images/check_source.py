"""Checks of a data source before any of its pictures is read."""

import importlib.util
import typing

from efficientllm.data.base import ImageSource
from efficientllm.errors import FieldError, short_repr
from efficientllm.runtime import optional_packages


def check_image_source(spec: str, source: typing.Any) -> None:
    """Raises UserError unless the source of a data spec gives pictures."""
    if getattr(source, "modality", "text") != "images":
        kind = spec.partition("(")[0]
        hint = (
            "name its column of images, hf(path=..., image='image')"
            if kind == "hf"
            else ("write glyphs(), or images(), webdataset() or hf() with a path")
        )
        raise FieldError("data", f"holds text, and images are needed; {hint}", spec)
    if importlib.util.find_spec("PIL") is None:
        raise FieldError("data", f"needs Pillow: {optional_packages.remedy('images')}", spec)
    if not isinstance(source, ImageSource):
        raise FieldError("data", "has no pictures(); derive it from efficientllm.data.ImageSource", spec)
    if source.streaming:
        raise FieldError("data", "images cannot be streamed; leave out streaming", spec)
    if source.channels not in (1, 3):
        raise FieldError("data", f"channels = {short_repr(source.channels)}: must be 3 (RGB) or 1 (gray)", spec)
    if not 0 <= source.held_out < 1:
        raise FieldError("data", "held_out must be at least 0 and below 1", spec)
