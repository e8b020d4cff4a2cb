"""One pass over a source of images: hashes, labels and decoded pixels, written as a cache entry."""

import collections
import concurrent.futures
import hashlib
import json
import logging
import os
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efficientllm.data.base import Content, ImageSource, Picture, Tally
from efficientllm.data.corpus import SIDES, split_threshold
from efficientllm.data.images import clips, decode
from efficientllm.data.images.buckets import Shape
from efficientllm.data.images.labels import number_labels
from efficientllm.errors import FieldError

CACHED_BYTES = 4 << 30  # of decoded pictures; a larger set is decoded each time it is read
THREADS = min(32, os.cpu_count() or 1)
PROGRESS_S = 30.0
log = logging.getLogger("efficientllm")


def list_pictures(spec: str, source: ImageSource) -> typing.Iterator[tuple[Picture, str]]:
    """Yields the pictures of a source with what messages call them. Raises UserError for what is no Picture."""
    for place, picture in enumerate(source.pictures()):
        if not isinstance(picture, Picture):
            raise FieldError(
                "data",
                f"picture {place} is of type {type(picture).__name__}; pictures() yields Picture(content, label=...)",
                spec,
            )
        yield picture, _name(picture, place, spec)


def _name(picture, place, spec):
    is_path = isinstance(picture.content, str | os.PathLike)
    return picture.name or (str(picture.content) if is_path else f"config.data = {spec!r}: picture {place}")


class _Examined(typing.NamedTuple):
    """What a thread made of a picture: its pixels, of the size of a bucket, or why it has none."""

    digest: bytes = b""
    bucket: int = 0
    pixels: np.ndarray | None = None
    unusable: decode.Unusable | None = None


class Reader:
    """One pass over a source, which writes a cache entry; `shapes` are those of its buckets."""

    def __init__(self, spec: str, source: ImageSource, shapes: Sequence[Shape], folder: Path):
        self.spec, self.source, self.shapes, self.folder = spec, source, shapes, folder
        self.tally, self.listed, self.is_decoded = Tally("pictures"), 0, True
        # Of the pictures that can be used: (place in the source, name), content, what decides the side, and so on.
        self.places: list[tuple[int, str]] = []
        self.digests: list[bytes] = []
        self.buckets: list[int] = []
        self.groups: list[int] = []
        self.labels: list[str | int | None] = []
        self.captions: list[str] = []

    def write(self) -> None:
        """Reads everything. Raises UserError where there are no two pictures to tell apart."""
        self._read()
        if len(set(self.groups)) < 2:
            skips = "; ".join([*self.source.notes(), *self.tally.skips()])
            count = "one" if self.groups else "none"
            raise FieldError(
                "data",
                f"training and held-out pictures need two different ones, there is {count}"
                + (f" ({skips})" if skips else ""),
                self.spec,
            )
        names = [name for _, name in self.places]
        class_names, labels = number_labels(self.spec, self.labels, names, self.source.classes)
        groups = np.array(self.groups, np.uint64)
        threshold = split_threshold(groups, self.source.held_out)
        is_held_out = groups < threshold
        arrays = {
            "contents": np.array([int.from_bytes(content[:8], "big") for content in self.digests], np.uint64),
            "labels": labels,
            "buckets": np.array(self.buckets, np.int32),
            "is_held_out": is_held_out,
            "places": np.array([place for place, _ in self.places], np.int64),
        }
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array)
        summary = self._summary(class_names, labels, is_held_out, threshold)
        (self.folder / "summary.json").write_text(json.dumps(summary), "utf-8")
        (self.folder / "captions.json").write_text(json.dumps(self.captions if any(self.captions) else []), "utf-8")

    def _read(self):
        """Reads every picture and keeps what is known of it; decoded ones are written unless they become too many."""
        path, rereadable, written, logged = self.folder / "pixels.bin", True, 0, time.monotonic()
        with open(path, "wb") as file:
            for picture, name, examined in _examined(self.spec, self.source, self.shapes):
                self.listed += 1
                rereadable &= callable(picture.content) or isinstance(picture.content, str | os.PathLike)
                if examined.unusable is not None:
                    detail = f" ({examined.unusable.detail})" if examined.unusable.detail else ""
                    self.tally.skip(examined.unusable.reason, f"{name}{detail}")
                    continue
                self._keep(picture, name, examined)
                written += examined.pixels.nbytes
                if self.is_decoded and written > CACHED_BYTES and rereadable:
                    self.is_decoded = False
                    file.truncate(0)
                if self.is_decoded:
                    file.write(examined.pixels)
                if time.monotonic() - logged > PROGRESS_S:
                    logged = time.monotonic()
                    log.info(f"data: {self.listed:,} pictures read")
        if not self.is_decoded:
            path.unlink()

    def _keep(self, picture, name, examined):
        self.places.append((self.listed - 1, name))
        self.digests.append(examined.digest)
        self.buckets.append(examined.bucket)
        group = examined.digest if picture.group is None else hashlib.sha256(picture.group.encode()).digest()
        self.groups.append(int.from_bytes(group[:8], "big"))
        self.labels.append(picture.label)
        self.captions.append(picture.caption)

    def _summary(self, class_names, labels, is_held_out, threshold):
        size, channels = self.source.size, self.source.channels
        clip = f"{self.source.frames} {self.source.stride} " if self.source.frames else ""
        clip += "" if is_square(self.source, self.shapes) else f"{self.shapes} "
        digest = hashlib.sha256(f"{clip}{size} {channels} {threshold} {class_names}".encode())
        for content, label, caption in zip(self.digests, labels.tolist(), self.captions, strict=True):
            digest.update(content + label.to_bytes(4, "little") + json.dumps(caption).encode())
        sides = dict(zip(SIDES, (~is_held_out, is_held_out), strict=True))
        counts = {f"{side}_images": int(chosen.sum()) for side, chosen in sides.items()}
        classes = {f"{side}_classes": len(np.unique(labels[chosen])) for side, chosen in sides.items() if class_names}
        return {
            "fingerprint": digest.hexdigest(),
            "size": size if isinstance(self.source.buckets, int) else None,
            "channels": channels,
            **counts,
            **classes,
            "class_names": class_names,
            "notes": [*self.source.notes(), *self.tally.skips(), *self._repeated()],
            "is_decoded": self.is_decoded,
            "listed": self.listed,
        }

    def _repeated(self):
        repeated = len(self.digests) - len(set(self.digests))
        return [f"{repeated:,} of the pictures repeat others"] if repeated else []


def _examined(spec, source, shapes):
    """Yields `(picture, name, _Examined)` of every picture in order, decoded in threads some pictures ahead."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(THREADS), collections.deque()
    try:
        for picture, name in list_pictures(spec, source):
            waiting.append((picture, name, pool.submit(_examine, source, shapes, picture, name)))
            if len(waiting) > 4 * THREADS:
                picture, name, future = waiting.popleft()
                yield picture, name, future.result()
        for picture, name, future in waiting:
            yield picture, name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _examine(source, shapes, picture, name):
    try:
        content = decode.read(picture)
        return _Examined(decode.digest(content), *decode_content(source, shapes, content, name))
    except decode.Unusable as error:
        return _Examined(unusable=error)


def decode_content(source: ImageSource, shapes: Sequence[Shape], content: Content, name: str) -> tuple[int, np.ndarray]:
    """Decodes what `decode.read` returned to its bucket's index and uint8 of that shape. Raises as `decode.decode`."""
    if source.frames:
        return clips.decode(content, shapes, source.stride, name)
    return decode.decode(content, shapes, name)


def is_square(source: ImageSource, shapes: Sequence[Shape]) -> bool:
    """Whether there is one bucket, of pictures or clips of `source.size` squared."""
    frames = (source.frames,) if source.frames else ()
    return list(shapes) == [(*frames, source.size, source.size, source.channels)]
