"""Data pipeline of the training loop: the tokenizer, an endless iterator of batches, held-out batches, a summary."""

import dataclasses
import typing

import numpy as np

from efficientllm.data.corpus import Corpus
from efficientllm.errors import FieldError
from efficientllm.registry import build
from efficientllm.typing import PathLike

CALIBRATION_ROWS = 16
_PREFETCHED = 2  # batches made while the device works; the state saved is that of the batch handed out


def build_tokenizer(tokenizer_spec: str, data_spec: str, cache_dir: PathLike | None = None) -> typing.Any:
    """Builds the tokenizer of `tokenizer_spec` (see `data.tokenizers`), trained on the data where it needs training."""
    return build("tokenizer", tokenizer_spec, where="config.tokenizer").fit(Corpus(data_spec, cache_dir))


def check_data(data_spec: str, cache_dir: PathLike | None = None) -> list[str]:
    """Reads the data, or its cached summary, and returns lines for the log about what was read.

    Raises UserError for data that cannot be trained on. It is called before anything that takes longer.
    """
    return Corpus(data_spec, cache_dir).summary["notes"]


def train_iterator(
    data_spec: str,
    tokenizer: typing.Any,
    batch_size: int,
    length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    cache_dir: PathLike | None = None,
) -> typing.Any:
    """Builds an endless grain iterator over this process's share of batches.

    A global batch has `batch_size` rows of `length` tokens.

    A batch is a dict of arrays [batch_size / process_count, length]: `tokens`, `targets`, `segments` (from 1 in each
    row, 0 is padding) and `positions` (from 0 in each segment), all int32, and `weights` float32, 0 where there is no
    target. `get_state` and `set_state` resume exactly. Raises UserError for a batch that the processes cannot share
    and for a length beyond the corpus.
    """
    from efficientllm.data.rows import packing

    share = share_of_process(batch_size, process_count)
    corpus = Corpus(data_spec, cache_dir)
    documents_seed, rows_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    if corpus.is_stream:
        from efficientllm.data.streaming import Stream

        documents = Stream(corpus, tokenizer, process_index, process_count)
        rows = packing.mix(packing.pack(documents, length), length, rows_seed)
        batches = packing.batch(rows, share)
    else:
        documents = _long_enough(corpus, tokenizer, "train", length)
        rows = _rows(documents, packing.endless(documents, documents_seed), length)
        rows = packing.mix(rows, length, rows_seed, -(-documents.size // length))
        batches = packing.batch(rows, batch_size, process_index, process_count)
    return packing.prefetch(batches, _PREFETCHED)


def eval_batches(
    data_spec: str,
    tokenizer: typing.Any,
    batch_size: int,
    length: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    cache_dir: PathLike | None = None,
) -> "EvalBatches":
    """Builds batches of the held-out documents, in the format of `train_iterator`, `limit` of them at most.

    Every token comes once, in a fixed order. The result can be iterated again; its length is the same for every
    process. Raises UserError as `train_iterator` does.
    """
    share_of_process(batch_size, process_count)
    documents = _long_enough(Corpus(data_spec, cache_dir), tokenizer, "held_out", length)
    if documents.records and limit:
        first = EvalBatches(documents, batch_size, length, 0, 1, limit)
        if not any(batch["weights"].any() for batch in first):
            raise FieldError(
                "batches",
                f"their held-out rows of {length} tokens have none to learn; raise it, or config.train.length",
                limit,
            )
    return EvalBatches(documents, batch_size, length, process_index, process_count, limit)


def describe_data(
    data_spec: str, tokenizer: typing.Any, length: int | None = None, cache_dir: PathLike | None = None
) -> dict[str, typing.Any]:
    """Describes the data for a run's record: source, sha256, and documents, bytes and tokens of each split.

    With `length`, tuning records are also counted by whether rows of `length` tokens truncate them. The numbers of a
    stream are those of the documents read ahead, and `sampled` is true.
    """
    corpus = Corpus(data_spec, cache_dir)
    sides = corpus.documents(tokenizer)
    tokens = {f"{side}_tokens": documents.size for side, documents in sides.items()}
    cut = {}
    if length and any(documents.records for documents in sides.values()):
        cut = {f"{side}_cut": documents.longer_than(length) for side, documents in sides.items()}
    return {**describe_documents(corpus), **tokens, **cut}


def describe_documents(corpus: Corpus) -> dict[str, typing.Any]:
    """Describes a corpus without its tokens, as `describe_data` does."""
    counts = {key: value for key, value in corpus.summary.items() if key not in ("threshold", "cut", "distinct")}
    return {"source": corpus.spec, "sampled": corpus.is_stream, **counts}


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Held-out batches of one process; each iteration packs them again."""

    documents: object
    batch_size: int
    length: int
    process_index: int
    process_count: int
    limit: int | None

    def __len__(self):
        batches = -(-self._count() // self.batch_size)
        return batches if self.limit is None else min(batches, self.limit)

    def __iter__(self):
        from efficientllm.data.rows import packing

        rows = _rows(self.documents, packing.in_order(self.documents), self.length)
        batches = packing.batch(rows, self.batch_size, self.process_index, self.process_count)
        for _, values in zip(range(len(self)), batches, strict=False):
            yield values

    def _count(self):
        """Counts the rows."""
        from efficientllm.data.rows import packing

        if not self.documents.records:
            return -(-self.documents.size // self.length)
        return sum(1 for _ in _rows(self.documents, packing.in_order(self.documents), self.length))


def _rows(documents, dataset, length):
    """Packs `documents` into rows: records are kept whole, text is a stream of tokens cut at the end of each row."""
    from efficientllm.data.rows import packing

    if not documents.records:
        return packing.pack(dataset, length)
    return packing.fit(dataset, length, bins=min(packing.BINS, -(-documents.size // length)))


def share_of_process(batch_size: int, process_count: int) -> int:
    """Returns how many rows of a global batch a process has. Raises UserError for a batch that cannot be shared."""
    if batch_size % process_count:
        raise FieldError(
            "train.batch_size",
            f"not divisible by the {process_count} processes; the next that is: "
            f"{batch_size + -batch_size % process_count}",
            batch_size,
        )
    return batch_size // process_count


def _long_enough(corpus, tokenizer, side, length):
    documents = corpus.documents(tokenizer)[side]
    if documents.size < (1 if documents.records else length):  # records are not cut to fill rows
        raise FieldError(
            "length",
            f"the {side.replace('_', '-')} text of {corpus.spec} has only {documents.size} tokens; shorten the length "
            "or add text",
            length,
        )
    if not documents.teaches(length):
        raise FieldError(
            "length", f"truncates every {side.replace('_', '-')} response of {corpus.spec}; raise it", length
        )
    return documents


def calibration_rows(data_spec: str, tokenizer: typing.Any, length: int, seed: int = 0) -> np.ndarray:
    """Returns train tokens `[CALIBRATION_ROWS, length]` without padding, to calibrate quantization on."""
    batches = train_iterator(data_spec, tokenizer, CALIBRATION_ROWS, length, seed=seed)
    pieces: list[np.ndarray] = []
    tokens = CALIBRATION_ROWS * length
    while sum(len(piece) for piece in pieces) < tokens:
        batch = next(batches)
        pieces.append(batch["tokens"][batch["segments"] > 0])
    batches.close()
    return np.concatenate(pieces)[:tokens].reshape(CALIBRATION_ROWS, length)
