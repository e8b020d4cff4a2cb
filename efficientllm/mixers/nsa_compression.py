"""Compressed branch of native sparse attention: blocks of keys compressed to one key, and attention over them.

Letters: d stride, P pieces of d tokens, l keys of a block, M compressed blocks, J blocks to select from, n selected
blocks, r query heads a KV head, v width of a value, W slots of a write.
"""

import collections
import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear
from efficientllm.mixers import block_selection, kv_cache
from efficientllm.mixers.base import State
from efficientllm.mixers.kv_cache import Shape

Chunk = tuple[tuple[int, int], int, int]  # (start, stop) of queries, compressed blocks they see, blocks to choose from
CHUNK, MAX_CHUNKS = (
    128,
    16,
)  # queries of a chunk, whose scores are in memory together; each chunk is compiled separately


class Compressor(nn.Module):
    """Compression network phi of Eq. 7, shared by KV heads.

    Each of a block's l keys gets a learned position. Their concatenation passes Linear(l K -> 2 K), GELU,
    Linear(2 K -> K).
    """

    block: int
    precision: str

    @nn.compact
    def __call__(self, x_BPdGK: jax.Array) -> jax.Array:
        """Compresses `[B, P, d, G, K] -> [B, M, G, K]`: block m is l / d pieces from piece m on."""
        K, pieces = x_BPdGK.shape[-1], self.block // x_BPdGK.shape[2]
        count = x_BPdGK.shape[1] - pieces + 1
        x_BMlGK = jnp.concatenate([x_BPdGK[:, i : i + count] for i in range(pieces)], axis=2)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None))
        position_lK = self.param("position", init, (self.block, K))
        x_BMGlK = jnp.moveaxis(x_BMlGK, 3, 2) + position_lK.astype(x_BMlGK.dtype)
        hidden = Linear(2 * K, (None, "mlp"), self.precision, name="up")(x_BMGlK.reshape(*x_BMGlK.shape[:3], -1))
        return Linear(K, ("mlp", None), self.precision, name="down")(nn.gelu(hidden))


@flax.struct.dataclass
class Layout:
    """Layout of compressed blocks: which queries see which blocks, and the blocks of `select` keys to select from.

    Attributes:
      begin_BM, end_BM: the first and the last token of each compressed block; beyond the row for empty places.
      start_BT: the first token of a query's document.
      index_BT: the token of a query.
      last_BT: the last token that a query may read.
      pieces: the pieces of d tokens that compressed blocks consist of.
      compress, select: keys of a compressed block, and of a selected one.
      keys: keys of a row.
      causal: query t is token t and reads no later one, so it sees at most t / d blocks.
      forced: the first and the recent blocks that a query selects in any case (`block_selection.choose`).
    """

    begin_BM: jax.Array
    end_BM: jax.Array
    start_BT: jax.Array
    index_BT: jax.Array
    last_BT: jax.Array
    pieces: block_selection.DocumentPieces
    compress: int = flax.struct.field(pytree_node=False)
    select: int = flax.struct.field(pytree_node=False)
    keys: int = flax.struct.field(pytree_node=False)
    causal: bool = flax.struct.field(pytree_node=False)
    forced: tuple[int, int] = flax.struct.field(pytree_node=False)

    def chunks(self) -> list[Chunk]:
        """Splits the queries: `[((start, stop), compressed blocks they may see, blocks to select from)]`."""
        length, total = self.index_BT.shape[1], self.end_BM.shape[1]
        return chunks(length, self.keys, self.compress, self.pieces.size, self.select, total, self.causal)

    def of_queries(self, start: int, stop: int) -> "Layout":
        """Returns the layout of a range of the queries."""

        def take(x_BT):
            return x_BT[:, start:stop]

        first_BT = self.pieces.first_BT
        pieces = self.pieces.replace(first_BT=None if first_BT is None else take(first_BT))  # type: ignore[attr-defined]
        per_query = {name: take(getattr(self, name)) for name in ("start_BT", "index_BT", "last_BT")}
        return self.replace(**per_query, pieces=pieces)  # type: ignore[attr-defined]


def count(length: int, compress: int, stride: int) -> int:
    """Counts the compressed blocks of a row of `length` tokens, at least one."""
    return max(1, (length - compress) // stride + 1)


def chunks(length: int, keys: int, compress: int, stride: int, select: int, total: int, causal: bool) -> list[Chunk]:
    """Splits `length` queries into chunks; see `Layout.chunks`."""
    size = max(CHUNK, -(-length // MAX_CHUNKS))
    ranges = [(start, min(length, start + size)) for start in range(0, length, size)]

    def reach(stop):
        return count(stop, compress, stride), -(-stop // select)

    return [(queries, *(reach(queries[1]) if causal else (total, -(-keys // select)))) for queries in ranges]


@jax.named_scope("attention")
def attend(
    q_BTGrK: jax.Array, k_BMGK: jax.Array, v_BMGv: jax.Array, layout: Layout, select_count: int
) -> tuple[jax.Array, jax.Array]:
    """Attends over the visible compressed blocks, and selects blocks by the attention weights.

    Returns `(y_BTGrv, block_BTGn)`: zeros where no block is visible; selected blocks of the document, -1 for none.
    """
    outputs = []
    for queries, visible_blocks, choices in layout.chunks():
        # The scores of all chunks would take T x T / d numbers of memory, so the backward pass rematerializes them.
        attend_chunk = jax.checkpoint(functools.partial(_attend, choices=choices, select_count=select_count))
        arrays = q_BTGrK[:, slice(*queries)], k_BMGK[:, :visible_blocks], v_BMGv[:, :visible_blocks]
        y, block = attend_chunk(*arrays, layout.of_queries(*queries))
        widest = min(select_count, -(-layout.keys // layout.select))
        block = jnp.pad(block, ((0, 0),) * 3 + ((0, widest - block.shape[-1]),), constant_values=-1)
        outputs.append((y, block))
    return tuple(jnp.concatenate(outputs_of_ranges, 1) for outputs_of_ranges in zip(*outputs, strict=True))


def _attend(q_BTGrK, k_BMGK, v_BMGv, layout, choices, select_count):
    visible_blocks = k_BMGK.shape[1]
    visible = layout.end_BM[:, None, :visible_blocks] <= layout.last_BT[..., None]
    visible_BTM = visible & (layout.begin_BM[:, None, :visible_blocks] >= layout.start_BT[..., None])
    visible = visible_BTM[:, None, None]
    # Where no block is visible softmax is uniform over the row; the second `where` makes its weights zero.
    accumulate = {"preferred_element_type": jnp.float32}
    scores_BGrTM = jnp.einsum("btgrk,bmgk->bgrtm", q_BTGrK, k_BMGK, **accumulate) * q_BTGrK.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores_BGrTM, jnp.finfo(jnp.float32).min), -1)
    weights_BGrTM = jnp.where(visible, weights, 0.0)
    y_BTGrv = jnp.einsum("bgrtm,bmgv->btgrv", weights_BGrTM.astype(v_BMGv.dtype), v_BMGv, **accumulate)
    shared_BGTM = jax.lax.stop_gradient(jnp.sum(weights_BGrTM, 2))
    score_BGTJ = importance(shared_BGTM, layout.pieces, layout.compress, layout.select, choices)
    local_BT, last_BT = layout.index_BT - layout.start_BT, layout.last_BT - layout.start_BT
    block_BTGn = block_selection.choose(score_BGTJ, local_BT, layout.select, select_count, *layout.forced, last_BT)
    return y_BTGrv.astype(q_BTGrK.dtype), block_BTGn


def importance(
    weights_BGTM: jax.Array, pieces: block_selection.DocumentPieces, compress: int, select: int, choices: int
) -> jax.Array:
    """Sums the weights of compressed blocks to scores of blocks to select, `[B, G, T, J]` (Eq. 9, counted from 0).

    Block j gets the sum over m < select / d, n < compress / d of weight j select / d + m - n.
    """
    # `offset_counts` says how often each offset m - n occurs, so the double sum is one sum of shifted weights.
    a, b = select // pieces.size, compress // pieces.size
    offset_counts = collections.Counter(m - n for m in range(a) for n in range(b))
    M = weights_BGTM.shape[-1]
    padded = jnp.pad(weights_BGTM, ((0, 0),) * 3 + ((b - 1, a + b),))
    total = sum(
        offset_counts[shift] * padded[..., shift + b - 1 : shift + b - 1 + M + b] for shift in sorted(offset_counts)
    )
    return pieces.by_document(total, choices, a)


def empty(batch: int, length: int, compress: int, stride: int, shape: Shape, dtype: jnp.dtype) -> State:
    """Allocates state for `length` tokens a row: finished blocks, and the tokens of unfinished blocks."""
    finished = kv_cache.empty({"k": shape, "v": shape}, batch, count(length, compress, stride), dtype)
    return finished | kv_cache.empty({"raw_k": shape, "raw_v": shape}, batch, compress, dtype)


def extend(
    state: State,
    new: dict[str, jax.Array],
    finish: Callable[..., tuple[jax.Array, jax.Array]],
    positions_BT: jax.Array,
    stride: int,
) -> State:
    """Adds tokens to a state and compresses the blocks that end in them.

    Args:
      state: as from `empty`. `raw_k` and `raw_v` start `compress - stride` tokens before the last multiple of `stride`.
      new: k and v of the tokens at `positions_BT`, `[B, T, G, K]`.
      finish: `(pieces of k, pieces of v, positions of the blocks' first tokens) -> (compressed k, compressed v)`.
    """
    compress = state["raw_k"].shape[1]
    start_B, stop_B = positions_BT[:, 0], positions_BT[:, -1] + 1
    # The raw tokens and the new ones, cut into pieces of `stride`, hold all blocks that can end in the new tokens. The
    # first of them is `first_B`; negative blocks, before the document, are compressed too and not written by `_put`.
    max_finished_blocks = -(-(stride - 1 + positions_BT.shape[1]) // stride)  # blocks that can end in the new tokens
    before = compress - stride

    def with_tokens(name):
        room_B = jnp.pad(state[f"raw_{name}"], ((0, 0), (0, max_finished_blocks * stride), (0, 0), (0, 0)))
        return kv_cache.write(room_B, new[name].astype(room_B.dtype), before + start_B % stride)

    raw = {name: with_tokens(name) for name in new}
    pieces = (raw[name][:, : before + max_finished_blocks * stride] for name in ("k", "v"))
    pieces = (x.reshape(x.shape[0], -1, stride, *x.shape[2:]) for x in pieces)
    first_B = start_B // stride - before // stride
    k_BM, v_BM = finish(*pieces, jnp.maximum(first_B[:, None] + jnp.arange(max_finished_blocks), 0) * stride)
    ended_B = (stop_B - compress) // stride + 1
    shift_B = (stop_B // stride - start_B // stride) * stride
    return {
        "k": _put(state["k"], k_BM, first_B, ended_B),
        "v": _put(state["v"], v_BM, first_B, ended_B),
        "raw_k": _slice(raw["k"], shift_B, compress),
        "raw_v": _slice(raw["v"], shift_B, compress),
    }


def _put(old_BS, new_BM, first_B, ended_B):
    """Writes new block m into slot first + m, if 0 <= first + m < `ended_B`."""
    # The write covers `width` slots, clipped to the cache. Slots without a new block keep their old block.
    width = min(new_BM.shape[1], old_BS.shape[1])
    at_B = jnp.clip(first_B, 0, old_BS.shape[1] - width)
    slot_BW = at_B[:, None] + jnp.arange(width)
    source_BW = slot_BW - first_B[:, None]
    new_BW = jax.vmap(lambda new, index: new.at[index].get(mode="clip"))(new_BM, source_BW)
    filled_BW = (slot_BW < ended_B[:, None]) & (source_BW < new_BM.shape[1]) & (source_BW >= 0)
    slots_BW = jnp.where(filled_BW[..., None, None], new_BW.astype(old_BS.dtype), _slice(old_BS, at_B, width))
    return kv_cache.write(old_BS, slots_BW, at_B)


def _slice(x_BS, at_B, length):
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, length, 0))(x_BS, at_B)
