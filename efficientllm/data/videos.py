"""Refusal of videos in records and prompts: how frames become tokens differs between versions of transformers."""

import typing

from efficientllm.errors import UserError

FIELDS = ("videos", "video")  # of a record
PLACES = ("<video>", "<|video_pad|>")  # in a text
REMEDY = "videos are not read; give frames of it as images, an <image> in the text for each"


def refuse_fields(record: dict[str, typing.Any], where: str) -> None:
    """Raises UserError for a record whose field names a video."""
    for name in FIELDS:
        if (value := record.get(name)) is not None and not _is_empty(value):
            raise UserError(f"{where}: {name} = {value!r:.80}: {REMEDY}")


def refuse_places(text: str, where: str) -> None:
    """Raises UserError for a text with the place of a video."""
    if (place := next((place for place in PLACES if place in text), None)) is not None:
        raise UserError(f"{where}: {place} in its text: {REMEDY}")


def _is_empty(value):
    """Whether a field is there for other records of a table alone."""
    return isinstance(value, str | list | tuple | dict) and not value
