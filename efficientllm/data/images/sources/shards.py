"""WebDataset shards: tar files in which the files of a sample have one name and several endings."""

import dataclasses
import functools
import itertools
import os
import tarfile
import typing

from efficientllm.data import cache, paths, streams
from efficientllm.data.base import MAX_IMAGE_BYTES, ImageSource, Picture, Tally
from efficientllm.data.images.sources.folders import ENDINGS
from efficientllm.errors import UserError
from efficientllm.registry import register

_MOST_TEXT = 1 << 20  # bytes of a label or a caption


@register("data", "webdataset")
@dataclasses.dataclass(frozen=True)
class WebDataset(ImageSource):
    """Pictures of tar files, which stay packed: `path` names them as a folder or a glob.

    A sample is the files that follow one another under one name up to the first dot: a picture, its class in the file
    that ends in `label` (a number or a name), its caption in the one that ends in `caption`.
    """

    path: str
    size: int = 256
    buckets: int | tuple = 1
    label: str = "cls"
    caption: str = "txt"
    channels: int = 3
    flip: bool = True
    held_out: float = 0.05
    tally: Tally = dataclasses.field(default_factory=lambda: Tally("pictures"), init=False, repr=False, compare=False)

    def key(self) -> str:
        """Changes when a shard or a field does."""
        return f"{self} {cache.stat_key(self._paths())}"

    def notes(self) -> list[str]:
        return list(self.tally.skips())

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields the pictures in the order of the shards. Raises UserError for what is no tar file, or damaged."""
        self.tally.reset()
        for path in self._paths():
            for name, members in itertools.groupby(_members(path), lambda member: _split(member.name)[0]):
                files = {_split(member.name)[1].lower(): member for member in members}
                ending = next((ending for ending in files if f".{ending.rpartition('.')[2]}" in ENDINGS), None)
                if ending is None or files[ending].size > MAX_IMAGE_BYTES:
                    self.tally.skip("samples without a picture, or with one too large", f"{path}: {name}")
                    continue
                label, caption = (_text(path, files.get(field)) for field in (self.label, self.caption))
                label = int(label) if label.isascii() and label.isdigit() else label or None
                image = files[ending]
                content = functools.partial(_read, path, image.offset_data, image.size)
                yield Picture(content, label, caption, name=f"{path}: {image.name}")

    def _paths(self):
        return paths.find_files(self.path, (".tar",))


def _split(name):
    """`(name up to the first dot of its last part, what follows)`."""
    folder, base = os.path.split(name)
    stem, _, ending = base.partition(".")
    return os.path.join(folder, stem), ending


def _members(path):
    """The regular files of a tar file."""
    with streams.reading(path):
        try:
            with tarfile.open(path, "r:") as archive:
                yield from (member for member in archive if member.isfile() and not member.issparse())
                end = archive.offset
        except tarfile.TarError as error:
            raise _damaged(path, " ".join(str(error).split())) from None
    if any(_read(path, end, tarfile.BLOCKSIZE)):  # tarfile takes a header that it cannot read for the end
        raise _damaged(path, f"no header at byte {end:,}")


def _damaged(path, reason):
    return UserError(f"{path}: is no tar file, or damaged ({reason}); unpack one that is packed")


def _read(path, offset, size):
    with streams.reading(path), open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _text(path, member):
    if member is None:
        return ""
    where = f"{path}: {member.name}"
    if member.size > _MOST_TEXT:
        raise UserError(f"{where}: {member.size:,} bytes are too many for a label or a caption; shorten it")
    return streams.decode_text(_read(path, member.offset_data, member.size), where).strip()
