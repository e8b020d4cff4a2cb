"""Attention masks: which keys a query reads, by order, segments and distance, and how many pairs those are."""

import math

import flax.struct
import jax
import jax.numpy as jnp

Range = tuple[int, int]  # (start, stop) of queries or keys
CHUNK = 64  # queries of a static chunk
MAX_CHUNKS = 32  # each static chunk is compiled separately
LOOP_CHUNK = 256  # queries of a chunk of a loop
LOOPS = 4  # loops over a causal row
FLASH_BLOCK = 64  # queries of a block of ops/native/flash_kernels.cc


@flax.struct.dataclass
class Mask:
    """Attention mask: a query reads keys of its segment, in the order of the mask, and within the window.

    Args:
      segments_BT: the document of each token of a packed row, 0 for padding; None where a row is one document.
      query_index_BT: the key index of each query; None where query t has index t (training, prefill without a state).
      key_index_BS: the index of each key, negative for an empty slot; None where key s has index s.
      window: how many keys a query reads to each side, itself included; None reads all.
      query_segments_BT: the document of each query, where queries are not all of the row's tokens.
      order: `causal`: a query reads no key after itself. `bidirectional`: it reads keys on both sides. `prefix`:
        causal, and tokens of one block read each other in both directions.
      blocks_BT: with `prefix`, the block of each token; 0 is none.
      query_blocks_BT: the block of each query, where queries are not all of the row's tokens.
      cross: keys are other tokens than queries, S of them, and `segments_BT` are theirs (`across`).
      shift: the index of the first query less that of the first key, where queries are consecutive and keys are, as in
        a chunk of a row; None where that is not known.
    """

    segments_BT: jax.Array | None = None
    query_index_BT: jax.Array | None = None
    key_index_BS: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    query_segments_BT: jax.Array | None = None
    order: str = flax.struct.field(pytree_node=False, default="causal")
    blocks_BT: jax.Array | None = None
    query_blocks_BT: jax.Array | None = None
    cross: bool = flax.struct.field(pytree_node=False, default=False)
    shift: jax.Array | None = None

    @classmethod
    def across(cls, query_segments_BT: jax.Array | None = None, key_segments_BS: jax.Array | None = None) -> "Mask":
        """Makes the mask of cross-attention: a query reads the keys of its segment.

        Without segments of the queries it reads every key that is no padding; without those of the keys, every key.
        """
        if key_segments_BS is None:
            query_segments_BT = None
        return cls(key_segments_BS, query_segments_BT=query_segments_BT, order="bidirectional", cross=True)

    @property
    def aligned(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query_index_BT is None and not self.cross

    @property
    def reads_all(self) -> bool:
        """Whether every query reads every key."""
        nothing = self.window is None and self.segments_BT is None and self.key_index_BS is None
        return nothing and self.order == "bidirectional"

    def dense(self, query_length: int, key_length: int) -> jax.Array:
        """Returns the mask as a boolean array `[B or 1, T, S]`, True where a query may read."""
        return self.rows((0, query_length), (0, key_length))

    def rows(self, queries: Range, keys: Range) -> jax.Array:
        """Returns `dense` for the queries and keys of two ranges."""
        mask_BTS = self._in_order(queries, keys)
        if self.key_index_BS is not None:
            mask_BTS &= self.key_index_BS[:, None, slice(*keys)] >= 0
        if self.segments_BT is None:
            return mask_BTS
        if self.cross and self.query_segments_BT is None:
            return mask_BTS & (self.segments_BT[:, None, slice(*keys)] > 0)
        return mask_BTS & _same(self.query_segments_BT, self.segments_BT, queries, keys)

    def _in_order(self, queries, keys):
        if self.order == "bidirectional" and self.window is None:
            return jnp.ones((1, queries[1] - queries[0], keys[1] - keys[0]), bool)
        distance_BTS = self.distance(queries, keys)
        mask_BTS = distance_BTS >= 0
        if self.order == "prefix":
            in_block = self.blocks_BT[:, None, slice(*keys)] > 0
            mask_BTS |= in_block & _same(self.query_blocks_BT, self.blocks_BT, queries, keys)
        if self.window is None:
            return mask_BTS
        if self.order == "causal":
            return mask_BTS & (distance_BTS < self.window)
        near_BTS = jnp.abs(distance_BTS) < self.window
        return near_BTS if self.order == "bidirectional" else mask_BTS & near_BTS

    def distance(self, queries: Range, keys: Range) -> jax.Array:
        """Computes the index of each query less that of each key, `[B or 1, T, S]`."""
        query_BT = jnp.arange(*queries)[None] if self.aligned else self.query_index_BT[:, slice(*queries)]
        key_BS = jnp.arange(*keys)[None] if self.key_index_BS is None else self.key_index_BS[:, slice(*keys)]
        return query_BT[:, :, None] - key_BS[:, None, :]

    def first_distance(self, queries: Range, keys: Range) -> int | jax.Array | None:
        """Returns the distance of the first pair of two ranges of consecutive tokens; None where they are not."""
        first = queries[0] - keys[0]
        if self.aligned and self.key_index_BS is None:
            return first
        return None if self.shift is None else self.shift + first

    def queries(self, length: int) -> dict[str, jax.Array | None]:
        """Returns the fields that tell index, segment and block of each of `length` queries, `[B or 1, T]`.

        A mask with these fields set may be of a part of the queries.
        """

        def own(of_queries, of_tokens):
            return of_tokens if of_queries is None and not self.cross else of_queries

        return {
            "query_index_BT": jnp.arange(length)[None] if self.query_index_BT is None else self.query_index_BT,
            "query_segments_BT": own(self.query_segments_BT, self.segments_BT),
            "query_blocks_BT": own(self.query_blocks_BT, self.blocks_BT),
        }

    def chunks(self, length: int) -> list[tuple[Range, Range]]:
        """Lists `(range of queries, range of the keys in their reach)` of the static chunks of a causal row."""
        return self._ranges(length, max(CHUNK, -(-length // MAX_CHUNKS)))

    def _ranges(self, length, size):
        starts = range(0, length, size)
        reach = length if self.window is None else self.window - 1
        return [((s, min(length, s + size)), (max(0, s - reach), min(length, s + size))) for s in starts]

    def loop(self, length: int, keys: int) -> tuple[int, int, int]:
        """Returns the chunks of a loop over T queries, the queries of each, and the keys that a chunk reads."""
        count = -(-length // LOOP_CHUNK)
        size = -(-length // count)
        reads_all = self.window is None or self.order == "causal"
        return count, size, keys if reads_all else min(keys, size + 2 * (self.window - 1))

    def loops(self, length: int) -> list[tuple[Range, Range]]:
        """Lists `(range of queries, range of the keys in their reach)` of the loops over a causal row.

        A few loops leave out most of the masked half, which one loop over all keys would compute.
        """
        size = max(1, -(-length // (LOOPS * LOOP_CHUNK))) * LOOP_CHUNK
        return self._ranges(length, size)

    def blocks(self, length: int, keys: int) -> list[tuple[int, int]]:
        """Lists `(queries, keys that they read)` of the blocks of the native kernel, without segments or padding."""
        sizes = []
        for start in range(0, length, FLASH_BLOCK):
            stop = min(length, start + FLASH_BLOCK)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            last = stop if self.order == "causal" else keys if self.window is None else stop + self.window - 1
            sizes.append((stop - start, min(keys, last) - first))
        return sizes

    def pairs(self, length: int, keys: int | None = None) -> float:
        """Counts query-key pairs per head of a row of one document; `keys` is S, T where it is None.

        A causal row has half of its square. The blocks of `prefix` are data: their later halves are not counted.
        """
        if self.order == "bidirectional":
            beyond = 0 if self.window is None else max(0, length - self.window)
            return length * (length if keys is None else keys) - beyond * (beyond + 1)
        window = length if self.window is None else min(self.window, length)
        return window * window / 2 + (length - window) * window

    def executed_pairs(self, kernel: str, length: int, keys: int | None = None) -> int:
        """Counts query-key pairs per head that an attention kernel computes for a row of `length` tokens."""
        keys = length if keys is None else keys
        if kernel == "flash":
            return sum(rows * read for rows, read in self.blocks(length, keys))
        if kernel not in ("chunked", "looped"):
            return length * keys
        if self.order != "causal":
            return math.prod(self.loop(length, keys))
        ranges = self.chunks(length) if kernel == "chunked" else self.loops(length)
        sizes = [(queries[1] - queries[0], keys[1] - keys[0]) for queries, keys in ranges]
        if kernel == "chunked":
            return sum(math.prod(size) for size in sizes)
        return sum(math.prod(self.loop(*size)) for size in sizes)


def flash_flops(q: tuple, v: tuple, is_causal: bool, window: int, is_gradient: bool) -> int:
    """Counts the FLOPs of one call of the native kernel from the shapes of q `[B, T, H, K]` and v `[B, S, G, V]`.

    Pairs are those that it multiplies where there are no segments. Gradients take three products as wide as a key
    (scores, dq, dk), and two as wide as a value (gradients of weights, dv).
    """
    (B, T, H, K), (_, S, _, V) = q, v
    mask = Mask(order="causal" if is_causal else "bidirectional", window=window or None)
    width = 3 * K + 2 * V if is_gradient else K + V
    return 2 * B * H * mask.executed_pairs("flash", T, S) * width


def _same(of_queries, of_keys, queries, keys):
    of_queries = of_keys if of_queries is None else of_queries
    return of_queries[:, slice(*queries), None] == of_keys[:, None, slice(*keys)]
