"""Packing of documents into rows of one length with grain: shuffled, batched, and resumable to the same batch."""

import atexit
import typing
import weakref
from collections.abc import Callable

import grain
import numpy as np

from efficientllm.typing import Batch

BINS = 64  # rows that are filled at a time with whole documents
SHUFFLED_ROWS, SHUFFLED_TOKENS = 512, 1 << 22  # whichever is less: the window is held in memory
_IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # memory maps gain nothing from threads


def in_order(documents: typing.Any) -> grain.IterDataset:
    """The documents once, as they come."""
    return grain.MapDataset.source(documents).to_iter_dataset(_IN_THIS_THREAD)


def endless(documents: typing.Any, seed: int) -> grain.IterDataset:
    """The documents again and again, in another order each epoch."""
    return grain.MapDataset.source(documents).shuffle(seed).repeat().to_iter_dataset(_IN_THIS_THREAD)


def pack(documents: grain.IterDataset, length: int) -> grain.IterDataset:
    """Rows of `length` tokens from an IterDataset of {"tokens", "targets"}.

    Documents are concatenated and cut, which wastes nothing: only the last row of a finite corpus holds padding, where
    first-fit packing would leave a few per cent of every row. A document that crosses the end of a row goes on in the
    next one as a segment of its own; its last token keeps its target, so every token is learnt once per epoch.
    """
    rows = grain.experimental.ConcatThenSplitIterDataset(
        documents, length_struct={"tokens": length, "targets": length}, split_full_length_features=True
    )
    return _Restorable(rows)


def fit(documents: grain.IterDataset, length: int, bins: int = BINS) -> grain.IterDataset:
    """Rows of `length` tokens from an IterDataset of {"tokens", "targets", "weights"}: whole documents side by side.

    Each goes into the first row with room for it, of `bins` that are filled at a time; what is longer than a row is cut
    at its end. Padding takes what is left.
    """
    cut = documents.map(lambda document: {key: value[:length] for key, value in document.items()})
    sizes = {"tokens": length, "targets": length, "weights": length}
    return grain.experimental.FirstFitPackIterDataset(
        cut, length_struct=sizes, num_packing_bins=bins, shuffle_bins=False
    )


def mix(rows: grain.IterDataset, length: int, seed: int, epoch: int = SHUFFLED_ROWS) -> grain.IterDataset:
    """Rows in random order within windows of 512 (of 4M tokens, if rows are long), so that the rows of a long document
    do not share a batch. A window is filled before the first step: it holds no more than the rows of an `epoch`.
    """
    window = max(1, min(SHUFFLED_ROWS, SHUFFLED_TOKENS // length, epoch))
    return grain.experimental.WindowShuffleIterDataset(rows, window_size=window, seed=seed)


def batch(
    rows: grain.IterDataset, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Batches of text: the fields of `data.pipeline.train_iterator`; see `shared_batches`."""
    return shared_batches(rows, batch_size, _named, process_index, process_count)


def shared_batches(
    rows: grain.IterDataset,
    batch_size: int,
    finish: Callable[[Batch], Batch],
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Batches of `batch_size` rows, of which each process keeps its own consecutive share, as `finish` makes them.

    Every process packs every row: the global batch then depends on the seed alone, not on how many processes train.
    A last batch that is not full is filled with rows of padding.
    """
    share = batch_size // process_count
    rows_of_process = slice(process_index * share, (process_index + 1) * share)
    filled = rows.batch(
        batch_size, batch_fn=lambda values: grain.experimental.batch_and_pad(values, batch_size=batch_size)
    )
    # One stage for both: a stage of its own is 24 more Python calls for each batch.
    return filled.map(lambda values: finish({key: value[rows_of_process] for key, value in values.items()}))


def prefetch(batches: grain.IterDataset, count: int) -> grain.DatasetIterator:
    """Iterator over the same batches, up to `count` of them made ahead in a thread. Its state is that of the batch
    handed out last, not of the last one made; `close()` ends the thread."""
    return _Prefetched(batches.__iter__(), count)


def _named(values):
    segments = values["tokens_segment_ids"]
    return {
        "tokens": values["tokens"],
        "targets": values["targets"],
        "segments": segments,
        "positions": values["tokens_positions"],
        "weights": values.get("weights", segments > 0).astype(np.float32),
    }


class _Restorable(grain.IterDataset):
    """Passes rows on. Its iterator takes back a state that went through JSON, as grain's own checkpoints do: JSON makes
    lists of the packer's pairs, and the packer compares them with tuples and would skip a document."""

    def __iter__(self):
        return _RestorableIterator(self._parent.__iter__())


class _RestorableIterator(grain.DatasetIterator):
    def __next__(self):
        return next(self._parent)

    def get_state(self):
        return self._parent.get_state()

    def set_state(self, state):
        slices = {key: tuple(bounds) for key, bounds in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})


class _Prefetched(grain.experimental.ThreadPrefetchDatasetIterator):
    """Closes once, and before the interpreter exits: grain's would close while modules are being taken apart, and
    print an exception nobody can act on."""

    def __init__(self, parent, count):
        super().__init__(parent, count)
        self._ended = False
        atexit.register(_close, weakref.ref(self))

    def close(self):
        if not self._ended:
            self._ended = True
            super().close()


def _close(reference):
    iterator = reference()
    if iterator is not None:
        iterator.close()
