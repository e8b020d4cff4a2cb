"""Checkpoint checksums: detect files that a disk or a copy has changed, before training resumes from them."""

import json
import pathlib
import zlib

FILE = "checksums.json"
_CHUNK = 1 << 22


def write(folder: pathlib.Path) -> None:
    """Writes the size and CRC-32 of each file below the folders in `folder`, before the checkpoint gets its name."""
    sums = {name: _sum(folder / name) for name in _files(folder)}
    (folder / FILE).write_text(json.dumps(sums, indent=1))


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the files of a checkpoint, as text; None if they are as written, or older than checksums."""
    try:
        sums = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{FILE}: {error}"
    if not isinstance(sums, dict):
        return f"{FILE} holds no checksums"
    for name, written in sums.items():
        try:
            if _sum(folder / name) != written:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _files(folder):
    """The files in subfolders: orbax still changes the files beside them."""
    inner = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(file.relative_to(folder).as_posix() for entry in inner for file in entry.rglob("*") if file.is_file())


def _sum(file):
    size = crc = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
