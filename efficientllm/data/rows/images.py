"""Batches of images with grain: shuffled, shared by processes, of one size each, decoded in threads, resumable."""

import hashlib
import sys
import typing

import grain
import numpy as np

from efficientllm.data.rows import packing

PREFETCHED = 2  # batches made while the device works; the state saved is that of the batch handed out
# (index of a picture, whether it is mirrored, whether its caption is dropped, whether its row is padding) -> its row
Load = typing.Callable[[int, bool, bool, bool], dict[str, typing.Any]]
Finish = typing.Callable[[dict[str, typing.Any]], dict[str, typing.Any]]


class Chances(typing.NamedTuple):
    """What is drawn for each training row: whether it is mirrored, if `flip`, and whether its caption is dropped."""

    seed: int
    flip: bool
    dropout: float = 0.0

    def draw(self, place: int) -> tuple[bool, bool]:
        """Draws `(mirrored, dropped)` for the row at a place of a run's order, the same in every process."""
        return self.flip and is_mirrored(self.seed, place), is_dropped(self.seed, place, self.dropout)


class Place(typing.NamedTuple):
    """A row of a batch: its number in the order of all processes, and the picture `indices[picture]` of a side.

    A row that is `padding` only fills up a batch; its picture is one of the batch's size, and weighs nothing.
    """

    number: int
    picture: int
    padding: bool = False


class Rows:
    """Rows of one process; a global batch has `batch_size` consecutive places, of which each process has its own
    consecutive share.
    """

    def __init__(
        self, order: typing.Any, batches: int, batch_size: int, process_index: int = 0, process_count: int = 1
    ):
        self.order, self.batches, self.batch_size = order, batches, batch_size
        self.share = batch_size // process_count
        self.first = process_index * self.share

    def __len__(self) -> int:
        return self.batches * self.share

    def __getitem__(self, row: int) -> Place:
        batch, in_share = divmod(row, self.share)
        return self.place(batch, self.first + in_share)

    def place(self, batch: int, row: int) -> Place:
        """The place of a row of a global batch."""
        number = batch * self.batch_size + row
        is_padding = number >= len(self.order)
        return Place(number, 0 if is_padding else int(self.order[number]), is_padding)


class BucketRows(Rows):
    """Rows of one process whose batches are each of one bucket; each picture is seen once an epoch.

    The last batch of a bucket in an epoch is filled up with padding.

    Args:
      members: of each bucket, the indices of its pictures.
      seed: shuffles the pictures of a bucket and the batches of an epoch, anew each epoch, without end; None reads
        `most` batches of each bucket at most, once: the first of every bucket, then the second, and so on.
    """

    def __init__(
        self,
        members: typing.Sequence[np.ndarray],
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        seed: int | None = None,
        most: int | None = None,
    ):
        counts = [-(-len(indices) // batch_size) for indices in members]
        rounds = [(number, bucket) for bucket, count in enumerate(counts) for number in range(count)]
        self.members, self.seed = members, seed
        self.of_epoch = [place for place in sorted(rounds) if seed is not None or most is None or place[0] < most]
        # The orders of buckets and of batches are of one seed; those of buckets of one length are the same.
        self.orders = [self._shuffled(len(indices)) for indices in members]
        batches = len(self.of_epoch) if seed is None else sys.maxsize // batch_size
        super().__init__(self._shuffled(len(self.of_epoch)), batches, batch_size, process_index, process_count)

    def _shuffled(self, count):
        return range(count) if self.seed is None or not count else endless_order(count, self.seed)

    @property
    def padding(self) -> int:
        """The rows of padding in an epoch."""
        return len(self.of_epoch) * self.batch_size - sum(map(len, self.members))

    def place(self, batch: int, row: int) -> Place:
        epoch, number = batch // len(self.of_epoch), batch * self.batch_size + row
        in_bucket, bucket = self.of_epoch[int(self.order[batch])]
        members, member = self.members[bucket], in_bucket * self.batch_size + row
        if member >= len(members):
            return Place(number, int(members[0]), True)
        return Place(number, int(members[int(self.orders[bucket][epoch * len(members) + member])]))


def endless_order(count: int, seed: int) -> grain.MapDataset:
    """The numbers below `count` again and again, in another order each epoch."""
    return grain.MapDataset.range(count).shuffle(seed).repeat()


def endless_rows(count: int, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Rows:
    """Rows of `count` pictures of one size without end, shuffled anew each epoch; batches may cross epochs."""
    order = endless_order(count, seed)
    return Rows(order, sys.maxsize // batch_size, batch_size, process_index, process_count)


def endless(
    indices: np.ndarray, rows: Rows, load: Load, finish: Finish, chances: Chances, threads: int
) -> grain.DatasetIterator:
    """Iterator over training batches without end; `close()` ends its threads.

    The global batch depends on the seed alone: order and `chances` do not change with the number of processes or
    `threads`.
    """

    def load_row(place):
        return load(int(indices[place.picture]), *chances.draw(place.number), place.padding)

    return packing.prefetch(_batches(rows, load_row, finish, threads), PREFETCHED)


def in_order(indices: np.ndarray, rows: Rows, load: Load, finish: Finish, threads: int) -> grain.IterDataset:
    """The batches of `rows` once."""
    return _batches(rows, lambda place: load(int(indices[place.picture]), False, False, place.padding), finish, threads)


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
