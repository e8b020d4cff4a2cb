"""ImageData: batches of pictures, or of their latents, of a data spec, for training and for held-out evaluation."""

import dataclasses
import functools
import importlib.util
import json
import typing
from pathlib import Path

import numpy as np

from efficientllm.data import cache
from efficientllm.data.base import ImageSource
from efficientllm.data.pipeline import share_of_process
from efficientllm.errors import UserError, short_repr
from efficientllm.registry import build
from efficientllm.runtime import optional_packages
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.typing import PathLike

if typing.TYPE_CHECKING:
    import grain

    from efficientllm.data.images.latents import Encode, Latents
    from efficientllm.data.images.picture_set import PictureSet
    from efficientllm.text_states.captions import CaptionStates

LARGEST = 2**14  # pixels of a side
Row = dict[str, typing.Any]


class ImageData:
    """Pictures, or clips, of a data spec. Building it reads nothing.

    A batch is a dict of arrays: `images` float32 `[B, h, w, C]` in [-1, 1], or `[B, F, h, w, C]` of clips, `labels`
    int32 `[B]`, `weights` float32 `[B]` (0 for rows that only fill up the last held-out batch), `identity` uint32 `[B]`
    (of the picture's content).
    With `encode`, `images` holds the means of the latents' posterior, not scaled, and there is `logvar`, as large: a
    sample is `images + exp(logvar / 2) * noise`.
    With `captions`, there are the states of each picture's caption, `text` float32 `[B, S, E]`, and `pooled` `[B, P]`.

    Args:
      spec: a data spec such as `glyphs(size=32)`.
      cache_dir: the folder of the cache (`data.cache.root`).
      encode: a frozen autoencoder's encoder (`latents.load_latents`), whose outputs are computed once and cached.
      encode_key: a string that changes when the encoder's weights do, such as their sha256.
      multiple: what the size has to be a multiple of, such as patch times the autoencoder's factor.
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
        _check_source(spec, self.source, multiple)
        try:
            check_shape(self.source.shape)
        except UserError as error:
            raise UserError(f"config.data = {spec!r}: {error}") from None
        if encode is not None and not encode_key:
            raise ValueError("encode needs an encode_key, or latents of other weights would be read from the cache")

    @functools.cached_property
    def pictures(self) -> "PictureSet":
        """The pictures, read at the first use. Raises UserError for data that cannot be trained on."""
        from efficientllm.data.images.picture_set import load_set

        pictures = load_set(self.spec, self.source, self.cache)
        if self.caption_states is not None:
            if not pictures.captions and not pictures.summary["class_names"]:
                raise UserError(
                    f"config.data = {self.spec!r}: has neither captions nor classes, and the model reads texts; give "
                    "the pictures captions, such as images(path=..., captions='txt')"
                )
            try:
                self.caption_states.prepare(_captions(pictures))
            except UserError as error:
                raise UserError(f"config.data = {self.spec!r}: captions: {error}") from None
        return pictures

    @functools.cached_property
    def latents(self) -> "Latents | None":
        """The latents, computed at the first use; None without `encode`."""
        from efficientllm.data.images.latents import load_latents

        if self.encode is None:
            return None
        return load_latents(self.pictures, self.encode, self.encode_key, self.source.flip, self.cache)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(h, w, C)` of a row of `images`, `(F, h, w, C)` of clips; with `encode` the latents', computed for it."""
        return self.source.shape if self.encode is None else self.latents.shape

    @property
    def class_names(self) -> list[str]:
        return self.pictures.summary["class_names"]

    @property
    def num_classes(self) -> int:
        """The number of classes, and the label that stands for none. 0 where pictures have no labels: theirs is 0."""
        return len(self.class_names)

    def model(self, model: typing.Any) -> typing.Any:
        """Returns the model that is trained on it."""
        return model

    def notes(self) -> list[str]:
        """Reads the pictures, or their cached summary, and returns lines for the log about what was read."""
        summary, (*frames, height, width, _) = self.pictures.summary, self.source.shape
        kind = f"clips of {frames[0]} frames" if frames else "pictures"
        total = f"{len(self.pictures):,} {kind} of {height} x {width}"
        classes = f" in {self.num_classes:,} classes" if self.num_classes else ""
        return [f"{total}{classes}, {summary['held_out_images']:,} of them held out", *summary["notes"]]

    def describe(self) -> dict[str, typing.Any]:
        """Describes the data for a run's record: source, sha256, and pictures and classes of each side."""
        hidden = ("class_names", "is_decoded", "listed")
        counts = {key: value for key, value in self.pictures.summary.items() if key not in hidden}
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

    def captions(self, side: str) -> list[str]:
        """Captions of a side, in the order of `indices`: names of classes where the source has none, or empty texts."""
        captions = _captions(self.pictures)
        return [captions[index] for index in self.indices(side)]

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> "grain.DatasetIterator":
        """Builds an endless iterator over this process's share of training batches, made ahead in threads.

        `get_state` and `set_state` resume exactly; `close()` ends the threads. The global batch depends on the seed
        alone. Raises UserError for a batch that the processes cannot share.
        """
        from efficientllm.data.rows import images

        share_of_process(batch_size, process_count)
        flip, indices = bool(self.source.flip), self.indices("train")
        share = (batch_size, process_index, process_count)
        chances = images.Chances(seed, flip, self.dropout)
        return images.endless(indices, self._row, self._finish, chances, *share, threads=self._threads())

    def held_out(
        self, batch_size: int, process_index: int = 0, process_count: int = 1, limit: int | None = None
    ) -> "HeldOut":
        """Builds batches of the held-out pictures, each once, in a fixed order, `limit` batches at most.

        The result can be iterated again; its length is the same for every process. Raises UserError as `train` does,
        and where nothing is held out.
        """
        share_of_process(batch_size, process_count)
        count = len(self.indices("held_out"))
        if not count:
            raise UserError(f"config.data = {self.spec!r}: no picture is held out; raise held_out")
        batches = -(-count // batch_size)
        return HeldOut(self, batch_size, process_index, process_count, min(batches, limit) if limit else batches)

    def _threads(self):
        """Decoding threads; memory maps gain nothing from any."""
        from efficientllm.data.images.read_source import THREADS

        is_mapped = (self.latents is not None or self.pictures.pixels is not None) and self.caption_states is None
        return 0 if is_mapped else THREADS

    def _row(self, index, mirrored=False, is_dropped=False):
        """A row of a batch, its pixels still uint8; of padding, zeros."""
        from efficientllm.data.rows.images import PADDING

        if index == PADDING:
            return {key: np.zeros_like(value) for key, value in self._row(0).items()}
        pictures = self.pictures
        row = {
            "labels": pictures.labels[index],
            "weights": np.float32(1),
            "identity": np.uint32(pictures.contents[index] & np.uint64(0xFFFFFFFF)),
        }
        if self.caption_states is not None:
            row |= self.caption_states["" if is_dropped else self._all_captions[index]]
        if self.latents is None:
            pixels = pictures[index]
            return {"images": pixels[..., ::-1, :] if mirrored else pixels, **row}
        place = (int(mirrored), index)
        return {"images": self.latents.means[place], "logvar": self.latents.logvars[place], **row}

    @functools.cached_property
    def _all_captions(self):
        return _captions(self.pictures)

    def _finish(self, batch):
        from efficientllm.data.images.latents import to_float

        return batch if self.latents is not None else {**batch, "images": to_float(batch["images"])}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out batches of one process; each iteration reads them again."""

    data: ImageData
    batch_size: int
    process_index: int
    process_count: int
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> typing.Iterator[Row]:
        from efficientllm.data.rows import images

        order = self.data.indices("held_out")
        rows = images.Rows(order, self.batches, self.batch_size, self.process_index, self.process_count)
        yield from images.in_order(rows, self.data._row, self.data._finish, self.data._threads())


def _captions(pictures):
    """The captions of a PictureSet, or the names of their classes."""
    if pictures.captions:
        return pictures.captions
    names = pictures.summary["class_names"]
    return [names[label] if names else "" for label in pictures.labels]


def _check_source(spec, source, multiple):
    """Raises UserError unless a source gives images that fit."""
    where = f"config.data = {spec!r}"
    if getattr(source, "modality", "text") != "images":
        kind = spec.partition("(")[0]
        hint = (
            "name its column of images, hf(path=..., image='image')"
            if kind == "hf"
            else ("write glyphs(), or images(), webdataset() or hf() with a path")
        )
        raise UserError(f"{where}: holds text, and images are needed; {hint}")
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"{where}: needs Pillow: {optional_packages.remedy('images')}")
    if not isinstance(source, ImageSource):
        raise UserError(f"{where}: has no pictures(); derive it from efficientllm.data.ImageSource")
    if source.streaming:
        raise UserError(f"{where}: images cannot be streamed; leave out streaming")
    size, channels = source.size, source.channels
    if type(size) is not int or not 1 <= size <= LARGEST:
        raise UserError(f"{where}: size = {short_repr(size)}: must be a whole number from 1 to {LARGEST}")
    if size % multiple:
        lower, upper = size - size % multiple, size + -size % multiple
        sizes = " or ".join(str(number) for number in (lower, upper) if number)
        raise UserError(f"{where}: size = {size}: is no multiple of the {multiple} pixels of a token; write {sizes}")
    if channels not in (1, 3):
        raise UserError(f"{where}: channels = {short_repr(channels)}: must be 3 (RGB) or 1 (gray)")
    if not 0 <= source.held_out < 1:
        raise UserError(f"{where}: held_out must be at least 0 and below 1")
