"""Bounded reads of text files beside a row (logs, samples); missing or unreadable files are empty."""

import os
import pathlib

from efficientllm.errors import UserError
from efficientllm.untrusted import files

MOST = 2**18  # bytes


def read_beginning(file: pathlib.Path, most: int = MOST) -> str:
    """Reads the first bytes of a file as text; empty if it is no regular file."""
    return _read(file, 0, most)


def read_end(file: pathlib.Path, most: int = MOST) -> str:
    """Reads the last bytes of a file as text; empty if it is no regular file."""
    return _read(file, -most, most)


def _read(file, place, most):
    if not files.is_file(file):
        return ""
    try:
        with files.open_file(file) as opened:
            opened.seek(place if place >= 0 else max(0, os.fstat(opened.fileno()).st_size + place))
            return opened.read(most).decode("utf-8", errors="replace")
    except (OSError, UserError):  # the report does without a text that cannot be read
        return ""
