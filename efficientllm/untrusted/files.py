"""Safe file reads: refuses FIFOs, devices and folders, and files above a size limit.

Opening a FIFO would wait for a writer, and reading /dev/zero would never end.
"""

import os
import pathlib
import stat
import typing

from efficientllm.errors import UserError
from efficientllm.typing import PathLike

MOST = 64 * 2**20  # bytes of a file that is read whole: config.json, an index, a tokenizer_config.json
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_file(path: PathLike) -> bool:
    """Whether `path` is a regular file. False for a path that cannot exist: too long, a loop of links."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_there(path: PathLike) -> bool:
    """Whether `path` exists. False for a path that cannot."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def size_of(path: PathLike, where: str | None = None) -> int:
    """The size of a regular file in bytes. Raises UserError as `open_file` does."""
    with open_file(path, where) as file:
        return os.fstat(file.fileno()).st_size


def open_file(path: PathLike, where: str | None = None) -> typing.BinaryIO:
    """Opens a regular file for reading bytes. Raises UserError that begins with `where`, by default the path."""
    where = where or str(path)
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {_reason(error, path)}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
        raise UserError(f"{where}: {_beside(where, path)}is {kind}, not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: PathLike, most: int = MOST, where: str | None = None) -> bytes:
    """Reads a file of at most `most` bytes. Raises UserError for a larger one, and as `open_file` does."""
    where = where or str(path)
    with open_file(path, where) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{where}: {_beside(where, path)}has {size:,} bytes; at most {most:,} are read")
        try:
            data = file.read(most + 1)  # files of /proc report a size of 0
        except OSError as error:
            raise UserError(f"{where}: {_reason(error, path)}") from None
    if len(data) > most:
        raise UserError(f"{where}: {_beside(where, path)}has more than {most:,} bytes, the most that are read")
    return data


def read_text(path: PathLike, most: int = MOST, where: str | None = None) -> str:
    """Reads a UTF-8 text without its byte order mark. Raises UserError as `read_bytes`, and for other encodings."""
    data = read_bytes(path, most, where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = where or str(path)
        raise UserError(f"{where}: {_beside(where, path)}is not UTF-8 (byte {error.start})") from None


def _beside(where, path):
    """The path, unless `where` already names it."""
    return "" if str(path) in where else f"{path} "


def _reason(error, path):
    name = pathlib.Path(os.fsdecode(path)).name
    return f"cannot be read: {getattr(error, 'strerror', None) or error}: {name[:80]!r}"
