"""Parts of the texts beside a row (logs, answers), whatever lies there and however long it is."""

import os

from efficientllm.errors import UserError
from efficientllm.untrusted import files

MOST = 2**18  # bytes


def beginning(file, most=MOST):
    """The first bytes of a file as text; empty where there is no regular file."""
    return _read(file, 0, most)


def end(file, most=MOST):
    """The last bytes of a file as text; empty where there is no regular file."""
    return _read(file, -most, most)


def _read(file, place, most):
    if not files.is_file(file):
        return ""
    try:
        with files.open_file(file) as opened:
            opened.seek(place if place >= 0 else max(0, os.fstat(opened.fileno()).st_size + place))
            return opened.read(most).decode("utf-8", errors="replace")
    except (OSError, UserError):  # a text beside a row is no part of it
        return ""
