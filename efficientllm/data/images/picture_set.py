"""PictureSet: the pictures of a source, split and hashed once, and cached decoded where they fit."""

import dataclasses
import functools
import hashlib
import json
import math
import typing
from pathlib import Path

import numpy as np

from efficientllm.data import cache
from efficientllm.data.base import ImageSource, Picture
from efficientllm.data.images import clips, decode
from efficientllm.data.images.buckets import Shape
from efficientllm.data.images.read_source import Reader, decode_content, is_square, list_pictures
from efficientllm.errors import FieldError, UserError

FORMAT = 2  # of a cache entry
ARRAYS = ("contents", "labels", "buckets", "is_held_out")
_content_keys: dict[tuple[str, str], str] = {}  # for the length of a process, of sources without a key


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures, or clips, that can be used, in the order of their source. `set[index]` is uint8 of its bucket's shape.

    Attributes:
      shapes: of the buckets, `(h, w, C)` or `(F, h, w, C)`.
      summary: class names, counts of each side, `fingerprint` (a sha256 of contents, labels, captions, size and
        split), and notes for the log.
      contents: uint64 `[n]`, the first 8 bytes of the sha256 of each content.
      labels: int32 `[n]`, 0 where there are no classes.
      buckets: int32 `[n]`, the index of each picture's shape.
      is_held_out: bool `[n]`.
      captions: `n` texts, or none.
      pixels: of all pictures, one after another, uint8, memory-mapped; None where `pictures` are decoded when they are
        read.
    """

    source: ImageSource
    shapes: tuple[Shape, ...]
    summary: dict[str, typing.Any]
    contents: np.ndarray
    labels: np.ndarray
    buckets: np.ndarray
    is_held_out: np.ndarray
    captions: list[str]
    pixels: np.ndarray | None
    pictures: list[tuple[Picture, str]]

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises UserError for a file that is no longer what it was."""
        if self.pixels is not None:
            start, shape = self._starts[index], self.shapes[self.buckets[index]]
            return np.array(self.pixels[start : start + math.prod(shape)]).reshape(shape)
        picture, name = self.pictures[index]
        try:
            content = decode.read(picture)
            if int.from_bytes(decode.digest(content)[:8], "big") != self.contents[index]:
                raise UserError(f"{name}: has changed since the run began; start anew with --overwrite")
            return decode_content(self.source, self.shapes, content, name)[1]
        except decode.Unusable as error:
            raise UserError(
                f"{name}: has changed since the run began ({error.reason}); start anew with --overwrite"
            ) from None

    @functools.cached_property
    def _starts(self):
        """Where the pixels of each picture begin, int64 `[n]`."""
        sizes = np.array([math.prod(shape) for shape in self.shapes], np.int64)[self.buckets]
        return np.cumsum(sizes) - sizes

    @functools.cached_property
    def texts(self) -> list[str]:
        """The caption of each picture: the name of its class where the source has none, or an empty text."""
        names = self.summary["class_names"]
        return self.captions or [names[label] if names else "" for label in self.labels]

    def indices(self, side: str) -> np.ndarray:
        """Indices of the pictures of a side, int64: the training ones in order, the held-out ones by their hash, so
        that the first few are of all classes."""
        chosen = np.flatnonzero(self.is_held_out == (side == "held_out"))
        return chosen[np.argsort(self.contents[chosen], kind="stable")] if side == "held_out" else chosen


def load_set(spec: str, source: ImageSource, shapes: tuple[Shape, ...], cache_root: Path) -> PictureSet:
    """Reads all pictures of a source, or their cache entry; `shapes` are those of its buckets.

    Raises UserError where they cannot be trained on.
    """
    import PIL

    key = source.key() or _content_key(spec, source, cache_root)
    decoding: tuple = (source.size, source.channels, source.classes, source.held_out, PIL.__version__)
    if source.frames:
        decoding += (source.frames, source.stride, clips.decoder_version())
    if not is_square(source, shapes):
        decoding += (shapes,)
    name = f"images-{cache.digest(FORMAT, key, *decoding)}"
    folder = cache.entry(cache_root, name, lambda new: Reader(spec, source, shapes, new).write())
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    index: dict[str, typing.Any] = {name: np.load(folder / f"{name}.npy") for name in ARRAYS}
    pixels, pictures = None, list[tuple[Picture, str]]()
    if summary["is_decoded"]:
        pixels = np.memmap(folder / "pixels.bin", np.uint8, "r")
    else:
        pictures = _again(spec, source, np.load(folder / "places.npy"), summary["listed"])
    index["captions"] = json.loads((folder / "captions.json").read_text("utf-8"))
    return PictureSet(source, shapes, summary, **index, pixels=pixels, pictures=pictures)


def _again(spec, source, places, listed):
    """`(picture, name)` of the pictures in these places of the source."""
    pictures = list(list_pictures(spec, source))
    if len(pictures) != listed:
        raise FieldError("data", f"lists {len(pictures)} pictures where it listed {listed} before", spec)
    return [pictures[place] for place in places]


def _content_key(spec, source, cache_root):
    """Hashes the contents of a source that has no key."""
    place = (spec, str(cache_root))
    if place not in _content_keys:
        digest = hashlib.sha256(str(source).encode())
        for picture, _ in list_pictures(spec, source):
            try:
                digest.update(decode.digest(decode.read(picture)))
            except decode.Unusable as error:
                digest.update(error.reason.encode())
            digest.update(repr(picture[1:]).encode())
        _content_keys[place] = digest.hexdigest()
    return _content_keys[place]
