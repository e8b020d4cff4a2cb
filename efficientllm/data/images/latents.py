"""Latents of a frozen autoencoder, computed once and cached: the posterior's mean and log variance of each picture."""

import dataclasses
import json
import logging
import typing
from pathlib import Path

import numpy as np

from efficientllm.data import cache
from efficientllm.data.images.buckets import frame_count
from efficientllm.data.images.picture_set import PictureSet
from efficientllm.errors import FieldError

ROWS = 16  # pictures, or frames of clips, encoded at a time, always as many: one compiled program
FORMAT = 1  # of a cache entry
Encode = typing.Callable[[np.ndarray], tuple[typing.Any, typing.Any]]
log = logging.getLogger("efficientllm")


@dataclasses.dataclass(frozen=True)
class Latents:
    """Memory-mapped float32 `[2 if mirrored else 1, n, h, w, c]` of the n pictures of a bucket and their mirror images.

    Of clips `[..., f, h, w, c]`.
    """

    means: np.ndarray
    logvars: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """`(h, w, c)`, or `(f, h, w, c)`."""
        return self.means.shape[2:]


def load_latents(
    pictures: PictureSet, bucket: int, encode: Encode, encode_key: str, flip: bool, cache_root: Path
) -> Latents:
    """Returns the latents of a bucket's pictures, encoded at the first call and cached by fingerprint and `encode_key`.

    `encode` maps float32 `[16, h, w, channels]` in [-1, 1], or of clips `[rows, F, h, w, channels]`, to `(mean,
    logvar)` of the posterior, neither scaled nor sampled. With `flip`, mirror images are encoded too: a latent cannot
    be mirrored. Raises UserError for values that are not finite.
    """
    several = (pictures.shapes[bucket],) if len(pictures.shapes) > 1 else ()
    name = f"latents-{cache.digest(FORMAT, pictures.summary['fingerprint'], encode_key, flip, *several)}"
    indices = np.flatnonzero(pictures.buckets == bucket)
    folder = cache.entry(cache_root, name, lambda new: _write(pictures, indices, encode, flip, new))
    shape = (1 + flip, len(indices), *json.loads((folder / "shape.json").read_text()))
    return Latents(*(np.memmap(folder / f"{name}.bin", np.float32, "r", shape=shape) for name in ("mean", "logvar")))


def to_float(pixels_BhwC: np.ndarray) -> np.ndarray:
    """Maps uint8 to float32 in [-1, 1]."""
    return pixels_BhwC.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _write(pictures, indices, encode, flip, folder):
    log.info(f"data: encoding {len(indices) * (1 + flip):,} {'clips' if pictures.source.frames else 'pictures'}")
    count = max(1, ROWS // max(1, frame_count(pictures.shapes[pictures.buckets[indices[0]]])))
    with open(folder / "mean.bin", "wb") as means, open(folder / "logvar.bin", "wb") as logvars:
        for mirrored in (False, True)[: 1 + flip]:
            for start in range(0, len(indices), count):
                rows = [pictures[index] for index in indices[start : start + count]]
                mean, logvar = _encoded(rows, count, encode, mirrored)
                for values, file in ((mean, means), (logvar, logvars)):
                    if not np.isfinite(values).all():
                        raise FieldError(
                            "autoencoder", f"latents of pictures from {start} on are not finite; take another"
                        )
                    file.write(values)
    (folder / "shape.json").write_text(json.dumps(mean.shape[1:]))


def _encoded(rows, count, encode, mirrored):
    """Float32 `(mean, logvar)` of a list of at most `count` pictures."""
    pixels_BhwC = np.zeros((count, *rows[0].shape), np.uint8)
    pixels_BhwC[: len(rows)] = rows
    mean, logvar = encode(to_float(pixels_BhwC[..., ::-1, :] if mirrored else pixels_BhwC))
    return tuple(np.ascontiguousarray(np.asarray(values, np.float32)[: len(rows)]) for values in (mean, logvar))
