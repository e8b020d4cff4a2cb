"""Atomic file writes: a reader, or a disk after a crash, has the old file or the new one, never a part."""

import contextlib
import os
import pathlib
import typing

from efficientllm.typing import PathLike


@contextlib.contextmanager
def replacing(file: PathLike) -> typing.Iterator[pathlib.Path]:
    """Context of a temporary path beside `file`, which replaces `file` at the end. After an error it is removed."""
    file = pathlib.Path(file)
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())  # else a crash may leave the new name with no content
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(file: PathLike, text: str) -> None:
    """Replaces `file` by `text`."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
