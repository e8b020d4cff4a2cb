"""Batches of images with grain: shuffled, shared by processes, decoded ahead in threads, resumable."""

import hashlib
import sys
import typing

import grain
import numpy as np

from efficientllm.data.rows import packing

PREFETCHED = 2  # batches made while the device works; the state saved is that of the batch handed out
PADDING = -1  # the index of a row that only fills up the last held-out batch
# (index of a picture, whether it is mirrored, whether its caption is dropped) -> its row
Load = typing.Callable[[int, bool, bool], dict[str, typing.Any]]
Finish = typing.Callable[[dict[str, typing.Any]], dict[str, typing.Any]]


class Chances(typing.NamedTuple):
    """What is drawn for each training row: whether it is mirrored, if `flip`, and whether its caption is dropped."""

    seed: int
    flip: bool
    dropout: float = 0.0

    def draw(self, place: int) -> tuple[bool, bool]:
        """Draws `(mirrored, dropped)` for the row at a place of a run's order, the same in every process."""
        return self.flip and is_mirrored(self.seed, place), is_dropped(self.seed, place, self.dropout)


class Rows:
    """Rows of one process: row `i` is `(place in the order of all processes, index of a picture)`.

    A global batch has `batch_size` consecutive places, of which each process has its own consecutive share.
    """

    def __init__(
        self, order: typing.Any, batches: int, batch_size: int, process_index: int = 0, process_count: int = 1
    ):
        self.order, self.batches, self.batch_size = order, batches, batch_size
        self.share = batch_size // process_count
        self.first = process_index * self.share

    def __len__(self) -> int:
        return self.batches * self.share

    def __getitem__(self, row: int) -> tuple[int, int]:
        batch, in_share = divmod(row, self.share)
        place = batch * self.batch_size + self.first + in_share
        return place, int(self.order[place]) if place < len(self.order) else PADDING


def endless_order(count: int, seed: int) -> grain.MapDataset:
    """The numbers below `count` again and again, in another order each epoch."""
    return grain.MapDataset.range(count).shuffle(seed).repeat()


def endless(
    indices: np.ndarray,
    load: Load,
    finish: Finish,
    chances: Chances,
    batch_size: int,
    process_index: int,
    process_count: int,
    threads: int,
) -> grain.DatasetIterator:
    """Iterator over training batches without end; `close()` ends its threads.

    The global batch depends on the seed alone: order and `chances` do not change with the number of processes or
    `threads`.
    """
    order = endless_order(len(indices), chances.seed)
    rows = Rows(order, sys.maxsize // batch_size, batch_size, process_index, process_count)

    def load_row(row):
        place, index = row
        return load(int(indices[index]), *chances.draw(place))

    return packing.prefetch(_batches(rows, load_row, finish, threads), PREFETCHED)


def in_order(rows: Rows, load: Load, finish: Finish, threads: int) -> grain.IterDataset:
    """The batches of `rows` once; `load` gets PADDING for rows beyond the pictures."""
    return _batches(rows, lambda row: load(row[1], False, False), finish, threads)


def is_mirrored(seed: int, place: int) -> bool:
    """Whether the row at a place of a run's order is mirrored: the flip of a coin."""
    return bool(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=1).digest()[0] & 1)


def is_dropped(seed: int, place: int, share: float) -> bool:
    """Whether the row at a place of a run's order loses its caption, as `share` of the rows do."""
    digest = hashlib.blake2b(f"caption {seed} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2.0**64


def _batches(rows, load_row, finish, threads):
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    loaded = grain.MapDataset.source(rows).map(load_row).to_iter_dataset(options)
    return loaded.batch(rows.share).map(finish)
