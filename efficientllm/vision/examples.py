"""Conversations about pictures as training rows: packed tokens, and the patches of each row's own images.

Letters: B rows, T tokens, S slots of patches, c features of a patch.
"""

import dataclasses
import functools
import math
import pathlib
import typing

import grain
import numpy as np

from efficientllm.data import pipeline
from efficientllm.data.base import Example, ExampleSource, blind_document
from efficientllm.data.corpus import Corpus, shifted
from efficientllm.data.rows import packing
from efficientllm.data.text import TextData
from efficientllm.embeds.vision_language import BATCH_KEYS, VisionLM
from efficientllm.errors import FieldError, error_prefix
from efficientllm.typing import Batch, Record
from efficientllm.vision.conversations import encode_example
from efficientllm.vision.image_headers import picture_size
from efficientllm.vision.processors import Processor, load_picture, within
from efficientllm.vision.token_rows import Prompt, slots_of, token_repeats, token_row
from efficientllm.vision.tower_rows import count_slots, tower_rows

BINS = 16  # rows that are filled at a time; their patches are held in memory
SPARE = 1.1  # slots of a row over the mean of the examples that fill its tokens
THREADS = 4  # that decode and resize
_SEGMENT = 1 << 16  # more than the frames or windows of an example


class Encoded(typing.NamedTuple):
    """An example that is ready but for its pixels: ids with a token for each feature, and which of them are learnt."""

    ids: np.ndarray
    learnt: np.ndarray
    example: Example
    slots: int


@dataclasses.dataclass(frozen=True)
class ExampleData:
    """Conversations of `config.data` with their pictures; `data.text.TextData` has the same methods.

    An example is never cut within an image: one of whose images or answers nothing fits into a row is left out, and
    counted.

    Args:
      text: the same conversations for a model that reads text alone: their split, summary and tokenizer.
      lm: the model, whose tower says what a patch is.
      processor: that of the model.
    """

    text: TextData
    lm: VisionLM
    processor: Processor

    @functools.cached_property
    def source(self) -> ExampleSource:
        return Corpus(self.text.spec).source

    @functools.cached_property
    def _processor(self):
        """The processor within the limit of the source."""
        return within(self.processor, self.source.max_pixels, f"config.data = {self.text.spec!r}")

    @functools.cached_property
    def sides(self) -> dict[str, list[Encoded]]:
        """The examples of each side. Raises UserError with the name of an example that cannot be encoded."""
        corpus, sides = Corpus(self.text.spec), {"train": [], "held_out": []}  # type: tuple[Corpus, dict]
        for place, example in enumerate(self.source.examples()):
            example = example if example.name else example._replace(name=f"example {place}")
            _, group = blind_document(example)
            if encoded := self._encode(example):
                sides[corpus.side(group)].append(encoded)
        for side, examples in sides.items():
            if not examples:
                raise FieldError(
                    "length",
                    f"no {side.replace('_', '-')} example of {self.text.spec} fits into so many tokens; raise it, or "
                    "change held_out",
                    self.text.length,
                )
        return sides

    def _encode(self, example):
        """An example, cut behind its images to the length of a row; None where they, or any answer, do not fit."""
        ids, learnt = encode_example(example, self.lm, self.text.tokenizer)
        grids = [self._grid(picture, example.name) for picture in example.pictures]
        counts = [math.prod(grid) // self.lm.vision.merge**2 for grid in grids]
        repeats = token_repeats(ids, counts, self.lm.image_token, example.name)
        ids, learnt = np.repeat(ids, repeats), np.repeat(learnt, repeats)
        is_image = ids == self.lm.image_token
        ids, learnt, rest = ids[: self.text.length + 1], learnt[: self.text.length + 1], is_image[self.text.length :]
        if rest.any() or not learnt[1:].any():
            return None
        return Encoded(ids, learnt, example, count_slots(self.lm.vision, tuple(grids)))

    def _grid(self, picture, name):
        """Tiles, rows and columns of patches of a picture, by its header alone."""
        processor, size = self._processor, picture_size(picture, name)
        with error_prefix(name):
            return processor.grid(*size)

    @functools.cached_property
    def row_slots(self) -> int:
        """Slots of patches of a row: as many as the examples need that fill its tokens, and those of any one."""
        examples = [encoded for side in self.sides.values() for encoded in side]
        slots, tokens = (sum(numbers) for numbers in zip(*((e.slots, len(e.ids) - 1) for e in examples), strict=True))
        mean = SPARE * slots / tokens * self.text.length
        unit = _unit(self.lm.vision)
        return max(*(encoded.slots for encoded in examples), 0, -(-math.ceil(mean) // unit) * unit)

    def model(self, lm: VisionLM) -> VisionLM:
        """Returns the model that is trained on it: its rows have as many slots as these."""
        return lm.clone(row_slots=self.row_slots)

    def train(self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1) -> typing.Any:
        """Builds an endless iterator over this process's share of batches; see `pipeline.train_iterator`."""
        pipeline.share_of_process(batch_size, process_count)
        documents_seed, rows_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
        examples = self.sides["train"]
        order = grain.MapDataset.range(len(examples)).shuffle(documents_seed).repeat()
        documents = order.map(lambda index: self._document(examples[index])).to_iter_dataset(_reading())
        rows = packing.mix(self._fit(documents), self.text.length, rows_seed, max(1, len(examples) // 2))
        batches = self._batches(rows, batch_size, process_index, process_count)
        return packing.prefetch(batches, 2)

    def held_out(
        self, batch_size: int, process_index: int = 0, process_count: int = 1, limit: int | None = None
    ) -> "HeldOutExamples":
        """Builds batches of the held-out examples, each once, in a fixed order, `limit` batches at most."""
        pipeline.share_of_process(batch_size, process_count)
        return HeldOutExamples(self, batch_size, process_index, process_count, limit)

    def held_out_rows(self) -> grain.IterDataset:
        """Rows of the held-out examples."""
        examples = self.sides["held_out"]
        order = grain.MapDataset.range(len(examples))
        return self._fit(order.map(lambda index: self._document(examples[index])).to_iter_dataset(_reading()))

    def count_rows(self, side: str) -> int:
        """Counts the rows of a side's examples in order, by their sizes alone: nothing is decoded."""
        sizes: list[dict[str, np.ndarray]] = [
            {"tokens": np.zeros(len(e.ids) - 1, np.int8), "slots": np.zeros(e.slots, np.int8)} for e in self.sides[side]
        ]
        most = {"tokens": self.text.length, "slots": self.row_slots}
        return sum(1 for _ in _first_fit(packing.in_order(sizes), most))

    def fill(self) -> dict[str, float]:
        """Computes the shares of tokens and of slots of patches that hold training examples; the rest is padding."""
        examples, rows = self.sides["train"], self.count_rows("train")
        tokens, slots = sum(len(e.ids) - 1 for e in examples), sum(e.slots for e in examples)
        return {
            "token_fill": tokens / (rows * self.text.length),
            "slot_fill": slots / (rows * self.row_slots) if self.row_slots else 1.0,
        }

    def _fit(self, documents):
        """Rows of whole examples side by side, each in the first row with room for its tokens and its patches."""
        of_text = dict.fromkeys(("tokens", "targets", "weights", "slots"), self.text.length)
        of_text |= {"coordinates": self.text.length} if self.lm.axes > 1 else {}
        of_patches = dict.fromkeys(self._patch_keys, self.row_slots)
        return _first_fit(documents, of_text | of_patches)

    @property
    def _patch_keys(self):
        keys = list(BATCH_KEYS.values())
        return keys if self.lm.vision.bin else [key for key in keys if key != BATCH_KEYS["windows_BS"]]

    def _document(self, encoded):
        """The arrays of an example, `[T, ...]` and `[S, ...]`. A slot counts from 1; 0 is text."""
        example, vision = encoded.example, self.lm.vision
        pictures = [self._prepare(picture, example.name) for picture in example.pictures]
        row = token_row(self.lm, Prompt(encoded.ids.tolist(), pictures, example.name))
        towers = tower_rows(vision, [pictures])
        document = shifted(encoded.ids) | {"weights": encoded.learnt[1:].astype(np.float32)}
        document["slots"] = 1 + slots_of(row, towers.slots[0])[:-1]
        if self.lm.axes > 1:
            document["coordinates"] = row.coordinates_TA[:-1]
        taken = slice(None if pictures else 0)
        return document | {
            BATCH_KEYS[field]: array[0, taken] for field, array in towers.patches._asdict().items() if array is not None
        }

    def _prepare(self, picture, name):
        return self._processor.prepare(load_picture(picture() if callable(picture) else picture, name))

    def _batches(self, rows, batch_size, process_index, process_count):
        return packing.shared_batches(rows, batch_size, self.join, process_index, process_count)

    def join(self, values: Batch) -> Batch:
        """Makes slots, frames and windows of packed examples those of their row, and drops what packing adds."""
        segments_BT, segments_BS = values["tokens_segment_ids"], values[f"{BATCH_KEYS['frames_BS']}_segment_ids"]
        batch = {
            "segments": segments_BT,
            "positions": values["tokens_positions"],
            **{key: values[key] for key in ("tokens", "targets", "weights", "coordinates") if key in values},
            **{key: values[key] for key in self._patch_keys},
        }
        slots_BT = values["slots"]
        firsts_BT = first_groups(segments_BT, segments_BS, self.lm.vision.merge**2)
        batch["slots"] = np.where(slots_BT > 0, slots_BT - 1 + firsts_BT, -1).astype(np.int32)
        for field in ("frames_BS", "windows_BS"):
            if (key := BATCH_KEYS[field]) in batch:
                apart = batch[key] + _SEGMENT * segments_BS
                batch[key] = np.where(batch[key] > 0, apart, 0).astype(np.int32)
        return batch

    def notes(self) -> list[str]:
        """Reads the data, or their cached summary, and returns lines for the log about what was read."""
        return pipeline.check_data(self.text.spec)

    def keep(self, workdir: pathlib.Path) -> None:
        """Writes the tokenizer into a run's folder, which serving reads."""
        self.text.keep(workdir)

    @property
    def tokenizer(self) -> typing.Any:
        return self.text.tokenizer

    @property
    def has_records(self) -> bool:
        return self.text.has_records

    @property
    def tokenizer_fingerprint(self) -> str | None:
        return self.text.tokenizer_fingerprint

    def describe(self) -> Record:
        """Returns the row's description of the data: that of the text, its pictures on either side, and its rows."""
        pictures = {
            f"{side}_pictures": sum(len(encoded.example.pictures) for encoded in examples)
            for side, examples in self.sides.items()
        }
        tokens = {
            f"{side}_tokens": sum(len(encoded.ids) - 1 for encoded in examples) for side, examples in self.sides.items()
        }
        summary = pipeline.describe_documents(Corpus(self.text.spec))
        documents = sum(summary[f"{side}_documents"] for side in self.sides)
        left_out = documents - sum(map(len, self.sides.values()))
        rows = {"row_slots": self.row_slots, "left_out": left_out} | self.fill()
        return summary | tokens | pictures | rows


@dataclasses.dataclass(frozen=True)
class HeldOutExamples:
    """Held-out batches of one process; each iteration makes them again."""

    data: ExampleData
    batch_size: int
    process_index: int
    process_count: int
    limit: int | None

    def __len__(self) -> int:
        return min(self._count, self.limit) if self.limit else self._count

    @functools.cached_property
    def _count(self):
        return -(-self.data.count_rows("held_out") // self.batch_size)

    def __iter__(self) -> typing.Iterator[Batch]:
        rows = self.data.held_out_rows()
        batches = self.data._batches(rows, self.batch_size, self.process_index, self.process_count)
        for _, batch in zip(range(len(self)), batches, strict=False):
            yield batch


def first_groups(segments_BT: np.ndarray, segments_BS: np.ndarray, group: int) -> np.ndarray:
    """Returns, for each token, the first feature of its own example's images in the row, int `[B, T]`."""
    firsts_BT = np.zeros_like(segments_BT)
    for row, (of_tokens, of_slots) in enumerate(zip(segments_BT, segments_BS, strict=True)):
        segments, places = np.unique(of_slots, return_index=True)
        starts = np.zeros(max(of_tokens.max(initial=0), of_slots.max(initial=0)) + 1, np.int64)
        starts[segments] = places // group
        firsts_BT[row] = starts[of_tokens]
    return firsts_BT


def _unit(vision):
    return int(np.lcm(max(vision.bin, 1), vision.merge**2))


def _first_fit(documents, most):
    """Rows of whole documents, each in the first of `BINS` rows with room for all of its arrays."""
    return grain.experimental.FirstFitPackIterDataset(
        documents, length_struct=most, num_packing_bins=BINS, shuffle_bins=False
    )


def _reading():
    return grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
