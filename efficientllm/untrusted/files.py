"""Regular files of at most a stated size: what is a FIFO, a device or a folder is refused before it is read.

Opening a FIFO waits for a writer, and /dev/zero has no end.
"""

import os
import pathlib
import stat

from efficientllm.errors import UserError

MOST = 64 * 2**20  # bytes of a text that is read whole: config.json, an index, a tokenizer_config.json
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_file(path):
    """Whether a regular file is there; False for a path that the system cannot have: too long, a loop of links."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_there(path):
    """Whether anything is there; False for a path that the system cannot have."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def size_of(path, where=None):
    """Bytes of a regular file. Raises UserError as `open_file` does."""
    with open_file(path, where) as file:
        return os.fstat(file.fileno()).st_size


def open_file(path, where=None):
    """A regular file, open to read bytes. Raises UserError beginning with `where`, the path where that is None."""
    where = where or str(path)
    try:
        # Without O_NONBLOCK the opening of a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {_reason(error, path)}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
        raise UserError(f"{where}: {_beside(where, path)}is {kind}, not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path, most=MOST, where=None):
    """A file's bytes. Raises UserError for one of more than `most`, and as `open_file` does."""
    where = where or str(path)
    with open_file(path, where) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{where}: {_beside(where, path)}has {size:,} bytes; at most {most:,} are read")
        try:
            data = file.read(most + 1)  # a file of /proc says that it has no bytes
        except OSError as error:
            raise UserError(f"{where}: {_reason(error, path)}") from None
    if len(data) > most:
        raise UserError(f"{where}: {_beside(where, path)}has more than {most:,} bytes, the most that are read")
    return data


def read_text(path, most=MOST, where=None):
    """A UTF-8 file's text, without a byte order mark. Raises UserError as `read_bytes` does, and for other bytes."""
    data = read_bytes(path, most, where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = where or str(path)
        raise UserError(f"{where}: {_beside(where, path)}is not UTF-8 (byte {error.start})") from None


def _beside(where, path):
    """The path, where the message has not named it."""
    return "" if str(path) in where else f"{path} "


def _reason(error, path):
    named = pathlib.Path(os.fsdecode(path)).name
    return f"cannot be read: {getattr(error, 'strerror', None) or error}: {named[:80]!r}"
