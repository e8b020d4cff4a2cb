"""Files that are replaced whole or not at all: a reader, and a disk after a crash, holds the old one or the new one."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def replacing(file):
    """A path beside `file` to write to; it takes the place of `file` at the end, and is removed if an error ends it."""
    file = pathlib.Path(file)
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # else a crash may leave the new name with no content
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(file, text):
    """Replaces `file` by `text`."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
