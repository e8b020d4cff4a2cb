"""ImageData: batches of pictures, or of their latents, of a data spec, for training and for held-out evaluation."""

import dataclasses
import functools
import json
import logging
import math
import typing
from pathlib import Path

import numpy as np

from efficientllm.data import cache
from efficientllm.data.images.buckets import bucket_shapes, count_pictures, describe_size
from efficientllm.data.images.check_source import check_image_source
from efficientllm.data.pipeline import share_of_process
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import build
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.typing import PathLike

if typing.TYPE_CHECKING:
    import grain

    from efficientllm.data.images.latents import Encode, Latents
    from efficientllm.data.images.picture_set import PictureSet
    from efficientllm.data.rows.images import Rows
    from efficientllm.text_states.captions import CaptionStates

log = logging.getLogger("efficientllm")
Row = dict[str, typing.Any]


class ImageData:
    """Pictures, or clips, of a data spec. Building it reads nothing.

    A batch is a dict of arrays: `images` float32 `[B, h, w, C]` in [-1, 1], or `[B, F, h, w, C]` of clips, `labels`
    int32 `[B]`, `weights` float32 `[B]` (0 for rows that only fill up a batch), `identity` uint32 `[B]` (of the
    picture's content). All pictures of a batch are of one bucket (`data.images.buckets`).
    With `encode`, `images` holds the means of the latents' posterior, not scaled, and there is `logvar`, as large: a
    sample is `images + exp(logvar / 2) * noise`.
    With `captions`, there are the states of each picture's caption, `text` float32 `[B, S, E]`, and `pooled` `[B, P]`.

    Args:
      spec: a data spec such as `glyphs(size=32)`.
      cache_dir: the folder of the cache (`data.cache.root`).
      encode: a frozen autoencoder's encoder (`latents.load_latents`), whose outputs are computed once and cached.
      encode_key: a string that changes when the encoder's weights do, such as their sha256.
      multiple: what each side has to be a multiple of, such as patch times the autoencoder's factor.
      check_shape: raises UserError for a shape of pictures, or clips, that the encoder does not take.
      captions: the states of captions, or of the names of classes where pictures have no captions.
      dropout: the share of training pictures whose caption is replaced by the empty text.

    Raises UserError for a spec that names no source of images, and for a size that does not fit.
    """

    def __init__(
        self,
        spec: str,
        cache_dir: PathLike | None = None,
        encode: "Encode | None" = None,
        encode_key: str = "",
        multiple: int = 1,
        check_shape: typing.Callable[[tuple[int, ...]], typing.Any] = lambda shape: None,
        captions: "CaptionStates | None" = None,
        dropout: float = 0.0,
    ):
        self.spec, self.encode, self.encode_key = spec, encode, encode_key
        self.caption_states, self.dropout = captions, dropout
        self.source: typing.Any = build("data", spec, where="config.data")
        self.cache: Path = cache.root(cache_dir)
        check_image_source(spec, self.source)
        try:
            self.shapes = bucket_shapes(self.source, multiple)
            for shape in self.shapes:
                check_shape(shape)
        except UserError as error:
            raise FieldError("data", str(error), spec) from None
        if encode is not None and not encode_key:
            raise ValueError("encode needs an encode_key, or latents of other weights would be read from the cache")

    @functools.cached_property
    def pictures(self) -> "PictureSet":
        """The pictures, read at the first use. Raises UserError for data that cannot be trained on."""
        from efficientllm.data.images.picture_set import load_set

        pictures = load_set(self.spec, self.source, self.shapes, self.cache)
        if self.caption_states is not None:
            if not pictures.captions and not pictures.summary["class_names"]:
                raise FieldError(
                    "data",
                    "has neither captions nor classes, and the model reads texts; give the pictures captions, such as "
                    "images(path=..., captions='txt')",
                    self.spec,
                )
            try:
                self.caption_states.prepare(pictures.texts)
            except UserError as error:
                raise FieldError("data", f"captions: {error}", self.spec) from None
        return pictures

    @functools.cached_property
    def latents(self) -> "dict[int, Latents] | None":
        """The latents of each bucket that has pictures, computed at the first use; None without `encode`."""
        from efficientllm.data.images.latents import load_latents

        if self.encode is None:
            return None
        arguments = self.encode, self.encode_key, self.source.flip, self.cache
        return {bucket: load_latents(self.pictures, bucket, *arguments) for bucket in self.buckets}

    @functools.cached_property
    def buckets(self) -> list[int]:
        """The indices into `shapes` of the buckets that have pictures, the one with the most pixels first."""
        used = set(self.pictures.buckets.tolist())
        return sorted(used, key=lambda bucket: (-math.prod(self.shapes[bucket]), bucket))

    @property
    def used_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the buckets that have pictures, the largest first; reads nothing where there is one bucket."""
        return [self.shapes[bucket] for bucket in self.buckets] if len(self.shapes) > 1 else list(self.shapes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(h, w, C)` of a row of `images` of the largest bucket, `(F, h, w, C)` of clips; with `encode` the latents',
        computed for it."""
        return self.used_shapes[0] if self.latents is None else self.latents[self.buckets[0]].shape

    @property
    def class_names(self) -> list[str]:
        return self.pictures.summary["class_names"]

    @property
    def num_classes(self) -> int:
        """The number of classes, and the label that stands for none. 0 where pictures have no labels: theirs is 0."""
        return len(self.class_names)

    def notes(self) -> list[str]:
        """Reads the pictures, or their cached summary, and returns lines for the log about what was read."""
        summary, kind = self.pictures.summary, "clips" if self.source.frames else "pictures"
        size = f"in {len(self.buckets)} buckets" if self.shapes[1:] else f"of {describe_size(self.shapes[0])}"
        classes = f" in {self.num_classes:,} classes" if self.num_classes else ""
        total = f"{len(self.pictures):,} {kind} {size}{classes}, {summary['held_out_images']:,} of them held out"
        return [total, *self._bucket_lines(kind), *summary["notes"]]

    def _bucket_lines(self, kind):
        for bucket in self.bucket_counts():
            count = bucket["train_images"] + bucket["held_out_images"]
            yield f"bucket {bucket['size']}: {count:,} {kind}, {bucket['held_out_images']:,} of them held out"

    def bucket_counts(self) -> list[dict[str, typing.Any]]:
        """The size and the pictures of each side of every bucket that has some; nothing where there is one bucket."""
        if len(self.shapes) == 1:
            return []
        of_sides = {side: self.pictures.buckets[self.indices(side)] for side in ("train", "held_out")}
        return [count_pictures(self.shapes[bucket], bucket, of_sides) for bucket in self.buckets]

    def describe(self) -> dict[str, typing.Any]:
        """Describes the data for a run's record: source, sha256, and pictures and classes of each side."""
        hidden = ("class_names", "is_decoded", "listed")
        counts = {key: value for key, value in self.pictures.summary.items() if key not in hidden}
        counts |= {"buckets": self.bucket_counts()} if len(self.shapes) > 1 else {}
        latents = {"latents_of": self.encode_key} if self.encode_key else {}
        captions = {} if self.caption_states is None else {"text_states": self.caption_states.spec}
        return {"source": self.spec, "sampled": False, **counts, "classes": self.num_classes, **latents, **captions}

    tokenizer_fingerprint = None  # pictures have no tokenizer

    def keep(self, workdir: Path) -> None:
        """Writes what a model must know of its pictures into a run's folder, which sampling reads."""
        *size, channels = self.image_shape
        side = size[0] if size[0] == size[1] else size
        picture = {"side": side, "channels": channels, "classes": self.num_classes, "class_names": self.class_names}
        write_atomically(workdir / "picture.json", json.dumps(picture, indent=1) + "\n")

    def indices(self, side: str) -> np.ndarray:
        """Indices into `pictures` of a side, "train" or "held_out", in the order of `held_out`'s batches."""
        return self.pictures.indices(side)

    def sampled_indices(self, side: str) -> np.ndarray:
        """`indices` of the largest bucket, in whose size samples are drawn."""
        indices = self.indices(side)
        return indices[self.pictures.buckets[indices] == self.buckets[0]]

    def captions(self, side: str) -> list[str]:
        """Captions of a side, in the order of `indices`: names of classes where the source has none, or empty texts."""
        return [self.pictures.texts[index] for index in self.indices(side)]

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> "grain.DatasetIterator":
        """Builds an endless iterator over this process's share of training batches, made ahead in threads.

        `get_state` and `set_state` resume exactly; `close()` ends the threads. The global batch depends on the seed
        alone. Raises UserError for a batch that the processes cannot share.
        """
        from efficientllm.data.rows import images

        share_of_process(batch_size, process_count)
        indices, share = self.indices("train"), (batch_size, process_index, process_count)
        if len(self.shapes) == 1:
            rows = images.endless_rows(len(indices), seed, *share)
        else:
            rows = images.BucketRows(self._members(indices), *share, seed=seed)
            log.info(
                f"data: an epoch is {len(rows.of_epoch):,} batches of one bucket each; {rows.padding:,} of their rows "
                "fill up the last batch of a bucket, and weigh nothing"
            )
        chances = images.Chances(seed, bool(self.source.flip), self.dropout)
        return images.endless(indices, rows, self._row, self._finish, chances, self._threads())

    def _members(self, indices):
        """Of each bucket, the places in `indices` of its pictures."""
        return [np.flatnonzero(self.pictures.buckets[indices] == bucket) for bucket in self.buckets]

    def held_out(
        self, batch_size: int, process_index: int = 0, process_count: int = 1, limit: int | None = None
    ) -> "HeldOut":
        """Builds batches of the held-out pictures, each once, in a fixed order, `limit` batches of a bucket at most.

        The result can be iterated again; its length is the same for every process. Raises UserError as `train` does,
        and where nothing is held out.
        """
        share_of_process(batch_size, process_count)
        from efficientllm.data.rows import images

        indices, share = self.indices("held_out"), (batch_size, process_index, process_count)
        if not len(indices):
            raise FieldError("data", "no picture is held out; raise held_out", self.spec)
        if len(self.shapes) > 1:
            return HeldOut(self, images.BucketRows(self._members(indices), *share, most=limit))
        batches = -(-len(indices) // batch_size)
        return HeldOut(self, images.Rows(range(len(indices)), min(batches, limit) if limit else batches, *share))

    def _threads(self):
        """Decoding threads; memory maps gain nothing from any."""
        from efficientllm.data.images.read_source import THREADS

        is_mapped = (self.latents is not None or self.pictures.pixels is not None) and self.caption_states is None
        return 0 if is_mapped else THREADS

    def _row(self, index, mirrored=False, is_dropped=False, is_padding=False):
        """A row of a batch, its pixels still uint8; of padding, zeros."""
        if is_padding:
            return {key: np.zeros_like(value) for key, value in self._row(index).items()}
        pictures = self.pictures
        row = {
            "labels": pictures.labels[index],
            "weights": np.float32(1),
            "identity": np.uint32(pictures.contents[index] & np.uint64(0xFFFFFFFF)),
        }
        if self.caption_states is not None:
            row |= self.caption_states["" if is_dropped else pictures.texts[index]]
        if self.latents is None:
            pixels = pictures[index]
            return {"images": pixels[..., ::-1, :] if mirrored else pixels, **row}
        latents, place = self.latents[pictures.buckets[index]], (int(mirrored), self._places[index])
        return {"images": latents.means[place], "logvar": latents.logvars[place], **row}

    @functools.cached_property
    def _places(self):
        """The place of each picture among those of its bucket."""
        places = np.zeros(len(self.pictures), np.int64)
        for bucket in self.buckets:
            of_bucket = self.pictures.buckets == bucket
            places[of_bucket] = np.arange(of_bucket.sum())
        return places

    def _finish(self, batch):
        from efficientllm.data.images.latents import to_float

        return batch if self.latents is not None else {**batch, "images": to_float(batch["images"])}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out batches of one process; each iteration reads them again."""

    data: ImageData
    rows: "Rows"

    def __len__(self) -> int:
        return self.rows.batches

    def __iter__(self) -> typing.Iterator[Row]:
        from efficientllm.data.rows import images

        data = self.data
        yield from images.in_order(data.indices("held_out"), self.rows, data._row, data._finish, data._threads())
