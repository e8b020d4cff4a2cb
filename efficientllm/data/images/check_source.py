"""Checks of a data source before any of its pictures is read."""

import importlib.util
import typing

from efficientllm.data.base import ImageSource
from efficientllm.errors import UserError, short_repr
from efficientllm.runtime import optional_packages


def check_image_source(spec: str, source: typing.Any) -> None:
    """Raises UserError unless the source of a data spec gives pictures."""
    where = f"config.data = {spec!r}"
    if getattr(source, "modality", "text") != "images":
        kind = spec.partition("(")[0]
        hint = (
            "name its column of images, hf(path=..., image='image')"
            if kind == "hf"
            else ("write glyphs(), or images(), webdataset() or hf() with a path")
        )
        raise UserError(f"{where}: holds text, and images are needed; {hint}")
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"{where}: needs Pillow: {optional_packages.remedy('images')}")
    if not isinstance(source, ImageSource):
        raise UserError(f"{where}: has no pictures(); derive it from efficientllm.data.ImageSource")
    if source.streaming:
        raise UserError(f"{where}: images cannot be streamed; leave out streaming")
    if source.channels not in (1, 3):
        raise UserError(f"{where}: channels = {short_repr(source.channels)}: must be 3 (RGB) or 1 (gray)")
    if not 0 <= source.held_out < 1:
        raise UserError(f"{where}: held_out must be at least 0 and below 1")
