"""Image files, and clips, of a folder or a glob, with class folders or captions."""

import dataclasses
import functools
import os
import typing

from efficientllm.data import cache, paths, row_readers, streams
from efficientllm.data.base import ImageSource, Picture, Tally
from efficientllm.data.images import clips
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import register

ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
)  # fmt: skip
_FILE_FIELDS, _CAPTION_FIELDS = ("file_name", "file", "image", "video", "path"), ("caption", "text")


@register("data", "images", choices={"labels": ("folder", "none")})
@dataclasses.dataclass(frozen=True)
class Images(ImageSource):
    """Image files that `path` names: those of a folder and of the folders in it, or of a glob.

    With `labels="folder"` a class is the folder directly below `path` that a file lies in; of a glob, the folder of the
    file. `captions` is "txt" for texts in files beside (`cat.txt` of `cat.png`), or a file of JSON, CSV or Parquet rows
    with `file_name` and `caption` (or `text`), whose names count from its own folder; pictures without one are skipped.
    """

    path: str
    size: int = 256
    buckets: int | tuple = 1
    labels: str = "folder"
    captions: str = ""
    channels: int = 3
    flip: bool = True
    held_out: float = 0.05
    tally: Tally = dataclasses.field(default_factory=lambda: Tally("pictures"), init=False, repr=False, compare=False)

    def key(self) -> str:
        """Changes when a file or a field does."""
        beside = [_beside(path) for path in self._paths()] if self.captions == "txt" else []
        rows = [self._captions_file()] if self.captions not in ("", "txt") else []
        return f"{self} {cache.stat_key([*self._files(), *filter(os.path.exists, beside), *rows])}"

    def notes(self) -> list[str]:
        return list(self.tally.skips())

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields the pictures in the order of their paths. Raises UserError for one in no class folder."""
        self.tally.reset()
        captions = self._captions() if self.captions not in ("", "txt") else {}
        for file in self._paths():
            caption = captions.get(os.path.realpath(file)) if self.captions != "txt" else _text(_beside(file))
            if self.captions and not caption:
                self.tally.skip("pictures without a caption", file)
            else:
                yield Picture(self._content(file), self._label(file), caption or "", name=file)

    def _files(self):
        """All files that are read."""
        return paths.find_files(self.path, ENDINGS)

    def _paths(self):
        """The path of each picture."""
        return self._files()

    def _content(self, path):
        return path

    def _label(self, file):
        if self.labels == "none":
            return None
        root = os.path.abspath(os.path.expanduser(self.path))
        if not os.path.isdir(root):
            return os.path.basename(os.path.dirname(file))
        folder, _, below = os.path.relpath(file, root).partition(os.sep)
        if not below:
            raise FieldError("data", f"{file} lies in no class folder; move it into one, or write labels='none'")
        return folder

    def _captions_file(self):
        folder = os.path.expanduser(self.path)
        beside = os.path.join(folder, self.captions)
        path = beside if os.path.isdir(folder) and os.path.exists(beside) else os.path.expanduser(self.captions)
        if not os.path.isfile(path):
            raise FieldError(
                "data", f"captions = {self.captions!r}: no such file; write 'txt' for texts beside the pictures"
            )
        return path

    def _captions(self):
        """`{path: caption}`."""
        file, captions = self._captions_file(), {}
        for where, row in row_readers.read_rows(file, "json", lambda names, where: list(_fields(names, where))):
            fields = _fields(row if isinstance(row, dict) else {}, where)
            name, caption = (row_readers.check_text(row[field], field, where) for field in fields)
            captions[os.path.realpath(os.path.join(os.path.dirname(file), name or ""))] = (caption or "").strip()
        return captions


@register("data", "videos", choices={"labels": ("folder", "none")})
@dataclasses.dataclass(frozen=True)
class Videos(Images):
    """Clips that `path` names: videos (which need PyAV), moving WebP, GIF and APNG, and folders of still pictures.

    A clip is every `stride`-th of the first frames of a file, `frames` of them; shorter ones are skipped. A folder that
    holds still pictures is a clip, whose frames are in the order of the numbers in their names. `labels` and `captions`
    are those of `images`; the text of the clip `walk.mp4`, or of the folder `walk`, is in `walk.txt`.
    """

    size: int = 128
    frames: int = 17
    shorter: tuple = ()
    stride: int = 1
    tally: Tally = dataclasses.field(default_factory=lambda: Tally("clips"), init=False, repr=False, compare=False)

    def _files(self):
        return paths.find_files(self.path, (*clips.MOVING, *clips.VIDEOS, *clips.STILL))

    def _paths(self):
        is_still = {file: file.lower().endswith(clips.STILL) for file in self._files()}
        return sorted({os.path.dirname(file) if still else file for file, still in is_still.items()})

    def _content(self, path):
        most = (self.frames - 1) * self.stride + 1
        return functools.partial(clips.read_folder, path, most) if os.path.isdir(path) else path


def _fields(names, where):
    """The fields of a row that hold the picture's name and its caption."""
    for known in (_FILE_FIELDS, _CAPTION_FIELDS):
        field = next((name for name in known if name in names), None)
        if field is None:
            raise UserError(row_readers.missing_field(known[0], names, where))
        yield field


def _beside(path):
    return (path if os.path.isdir(path) else os.path.splitext(path)[0]) + ".txt"


def _text(path):
    return streams.whole(path).strip() if os.path.exists(path) else ""
