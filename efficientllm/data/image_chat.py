"""Conversations about pictures from the user's files: the forms of transformers, TRL and LLaVA."""

import dataclasses
import pathlib
import typing
from collections.abc import Sequence

from efficientllm.data import row_readers, videos
from efficientllm.data.base import Example, ExampleSource, Tally
from efficientllm.data.files import Files
from efficientllm.data.messages import ROLES
from efficientllm.data.record_layouts import MESSAGES
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import register

_PICTURES = ("images", "image")  # fields of a record
_IN_PART = ("image", "path", "url")  # keys of a part that name its picture


@register("data", "image_chat", example="image_chat(path='records.jsonl')")
@dataclasses.dataclass(frozen=True)
class ImageChat(ExampleSource, Files):
    """Records of JSON or Parquet with `messages` (or LLaVA's `conversations`) and `images` (or `image`).

    A content is a text, in which `<image>` stands for the next picture, or a list of parts `{"type": "text"}` and
    `{"type": "image"}`; a picture is a file's name, relative to `images`, or `{"bytes": ...}` of a Parquet file.

    Args:
      path: files, folders or patterns.
      images: the folder of pictures; empty is that of the record's file.
      max_pixels: what pictures are shrunk to at most, 0 for the model's own limit.
    """

    tally: Tally = dataclasses.field(default_factory=lambda: Tally("records"), init=False, repr=False, compare=False)
    images: str = ""
    held_out: float = 0.05
    max_pixels: int = 0

    endings = row_readers.ENDINGS

    def examples(self) -> typing.Iterator[Example]:
        """Yields the records. Raises UserError, naming file and line, for one that is no conversation."""
        self.tally.reset()
        for path in self._files():
            folder = pathlib.Path(self.images).expanduser() if self.images else pathlib.Path(path).parent
            for where, row in row_readers.read_rows(path, "json", lambda names, where: list(names)):
                self.tally.read += 1
                yield _example(row, where, folder)
        if not self.tally.read:
            raise FieldError("data", f"path = {self.path!r}: no record in it; name files of conversations")


def _example(row, where, folder):
    turns = next((row[key] for key in MESSAGES if isinstance(row, dict) and row.get(key)), None)
    if not isinstance(turns, list):
        raise UserError(f"{where}: has no list 'messages' or 'conversations'; write turns of 'role' and 'content'")
    videos.refuse_fields(row, where)
    listed = next((row[key] for key in _PICTURES if row.get(key) is not None), [])
    example = conversation_example(turns, listed if isinstance(listed, list | tuple) else [listed], where)
    return example._replace(pictures=tuple(_picture(picture, where, folder) for picture in example.pictures))


def conversation_example(turns: list, pictures: Sequence[typing.Any], where: str) -> Example:
    """Converts turns to an Example named `where`; its pictures are those that parts name, or `pictures`.

    Raises UserError, naming the turn, for what is no conversation, and where both name pictures.
    """
    named: list[typing.Any] = []
    messages = [_message(turn, f"{where}, turn {number}", named) for number, turn in enumerate(turns, 1)]
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise UserError(f"{where}: no turn of the assistant: there is nothing to learn; add an answer")
    if named and pictures:
        raise UserError(f"{where}: names pictures in its parts and in a field beside them; take one of both")
    return Example(messages, tuple(named or pictures), name=where)


def _message(turn, where, named):
    """The turn in transformers' format; pictures that its parts name are added to `named`."""
    speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None or not isinstance(content, str | list):
        raise UserError(f"{where}: is {turn!r:.80}; a turn is {{'role': ..., 'content': ...}} with a known role")
    if isinstance(content, str):
        videos.refuse_places(content, where)
        return {"role": role, "content": content}
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in videos.FIELDS:
            raise UserError(f"{where}: has a part {part!r:.80}: {videos.REMEDY}")
        if kind == "text" and isinstance(part.get("text"), str):
            videos.refuse_places(part["text"], where)
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and role != "assistant":
            parts.append({"type": "image"})
            named += [part[key] for key in _IN_PART if part.get(key)][:1]
        else:
            raise UserError(f"{where}: has a part {part!r:.80}; texts, and images of questions, can be learnt")
    text = "".join(part.get("text", "") for part in parts)
    return {"role": role, "content": parts if role == "user" else text}


def _picture(picture, where, folder):
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, str) or "://" in picture:
        raise UserError(f"{where}: image = {picture!r:.80}: must be the name of a file, or bytes; download it first")
    file = folder / picture.removeprefix("file:")
    if not file.is_file():
        raise UserError(f"{where}: image = {picture!r:.80}: there is no file {file}; name its folder with images=...")
    return file
