"""PictureSet: the pictures of a source, split and hashed once, and cached decoded where they fit."""

import dataclasses
import hashlib
import json
import typing
from pathlib import Path

import numpy as np

from efficientllm.data import cache
from efficientllm.data.base import ImageSource, Picture
from efficientllm.data.images import clips, decode
from efficientllm.data.images.read_source import Reader, decode_content, list_pictures
from efficientllm.errors import UserError

FORMAT = 1  # of a cache entry
ARRAYS = ("contents", "labels", "is_held_out")
_content_keys: dict[tuple[str, str], str] = {}  # for the length of a process, of sources without a key


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures, or clips, that can be used, in the order of their source. `set[index]` is uint8 of `source.shape`.

    Attributes:
      summary: class names, counts of each side, `fingerprint` (a sha256 of contents, labels, captions, size and
        split), and notes for the log.
      contents: uint64 `[n]`, the first 8 bytes of the sha256 of each content.
      labels: int32 `[n]`, 0 where there are no classes.
      is_held_out: bool `[n]`.
      captions: `n` texts, or none.
      pixels: uint8 `[n, *source.shape]`, memory-mapped; None where `pictures` are decoded when they are read.
    """

    source: ImageSource
    summary: dict[str, typing.Any]
    contents: np.ndarray
    labels: np.ndarray
    is_held_out: np.ndarray
    captions: list[str]
    pixels: np.ndarray | None
    pictures: list[tuple[Picture, str]]

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises UserError for a file that is no longer what it was."""
        if self.pixels is not None:
            return np.array(self.pixels[index])
        picture, name = self.pictures[index]
        try:
            content = decode.read(picture)
            if int.from_bytes(decode.digest(content)[:8], "big") != self.contents[index]:
                raise UserError(f"{name}: has changed since the run began; start anew with --overwrite")
            return decode_content(self.source, content, name)
        except decode.Unusable as error:
            raise UserError(
                f"{name}: has changed since the run began ({error.reason}); start anew with --overwrite"
            ) from None

    def indices(self, side: str) -> np.ndarray:
        """Indices of the pictures of a side, int64: the training ones in order, the held-out ones by their hash, so
        that the first few are of all classes."""
        chosen = np.flatnonzero(self.is_held_out == (side == "held_out"))
        return chosen[np.argsort(self.contents[chosen], kind="stable")] if side == "held_out" else chosen


def load_set(spec: str, source: ImageSource, cache_root: Path) -> PictureSet:
    """Reads all pictures of a source, or their cache entry. Raises UserError where they cannot be trained on."""
    import PIL

    key = source.key() or _content_key(spec, source, cache_root)
    decoding: tuple = (source.size, source.channels, source.classes, source.held_out, PIL.__version__)
    if source.frames:
        decoding += (source.frames, source.stride, clips.decoder_version())
    name = f"images-{cache.digest(FORMAT, key, *decoding)}"
    folder = cache.entry(cache_root, name, lambda new: Reader(spec, source, new).write())
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    index: dict[str, typing.Any] = {name: np.load(folder / f"{name}.npy") for name in ARRAYS}
    pixels, pictures = None, list[tuple[Picture, str]]()
    if summary["is_decoded"]:
        shape = (len(index["contents"]), *source.shape)
        pixels = np.memmap(folder / "pixels.bin", np.uint8, "r", shape=shape)
    else:
        pictures = _again(spec, source, np.load(folder / "places.npy"), summary["listed"])
    index["captions"] = json.loads((folder / "captions.json").read_text("utf-8"))
    return PictureSet(source, summary, **index, pixels=pixels, pictures=pictures)


def _again(spec, source, places, listed):
    """`(picture, name)` of the pictures in these places of the source."""
    pictures = list(list_pictures(spec, source))
    if len(pictures) != listed:
        raise UserError(f"config.data = {spec!r}: lists {len(pictures)} pictures where it listed {listed} before")
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
