"""Block selection for sparse attention: blocks of tokens in each document, and the top-k blocks of a query.

Letters: P pieces of a row, C choosers (query heads that choose together), J blocks of a row, n selected blocks.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.ops.attention import Mask


def document_starts(mask: Mask, length: int) -> jax.Array:
    """Finds the index of the first token of each token's document, `[B or 1, T]`."""
    if mask.segments_BT is None:
        return jnp.zeros((1, length), jnp.int32)
    segments = mask.segments_BT
    index_T = jnp.arange(length, dtype=jnp.int32)
    changes_BT = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(changes_BT, index_T, 0), axis=1)


def document_ends(mask: Mask, length: int) -> jax.Array:
    """Finds the index of the last token of each token's document, `[B or 1, T]`."""
    if mask.segments_BT is None:
        return jnp.full((1, length), length - 1, jnp.int32)
    from_end = document_starts(Mask(mask.segments_BT[:, ::-1]), length)
    return length - 1 - from_end[:, ::-1]


@flax.struct.dataclass
class DocumentPieces:
    """Complete pieces of `size` tokens of each document, in order: at most T / size, however the row is packed.

    Attributes:
      last_BP: the index of the last token of each piece; T or more for empty places.
      first_BT: the place of the first piece of a token's document; None where a row is one document.
      place_BT: the place of each token among the tokens of all pieces; negative for tokens of an incomplete piece. None
        where a row is one document.
    """

    last_BP: jax.Array
    first_BT: jax.Array
    place_BT: jax.Array
    size: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, mask: Mask, length: int, size: int, at_least: int = 1) -> "DocumentPieces":
        """Finds the pieces of rows of `length` tokens; `at_least` is the least P."""
        count = max(length // size, at_least)
        if mask.segments_BT is None:
            return cls((jnp.arange(count)[None] + 1) * size - 1, None, None, size)
        index_T = jnp.arange(length, dtype=jnp.int32)
        # A piece ends at every `size`-th token of a document. Piece p of a row ends at the first token where the
        # running count of ends is p + 1.
        local_BT = index_T - document_starts(mask, length)
        ended_BT = jnp.cumsum((local_BT + 1) % size == 0, 1, dtype=jnp.int32)
        last_BP = jax.vmap(lambda ended_T: jnp.searchsorted(ended_T, jnp.arange(1, count + 1)))(ended_BT)
        # Pieces before this document: all pieces ended so far without those of this document.
        first_BT = ended_BT - (local_BT + 1) // size
        piece_BT = first_BT + local_BT // size
        end_BT = index_T - local_BT % size + size - 1
        whole_BT = jnp.take_along_axis(last_BP, jnp.minimum(piece_BT, count - 1), 1) == end_BT
        whole_BT &= piece_BT < count
        return cls(last_BP, first_BT, jnp.where(whole_BT, piece_BT * size + local_BT % size, -1), size)

    def of_tokens(self, x_BT: jax.Array) -> jax.Array:
        """Groups tokens by piece: `[B, T, ...] -> [B, P, size, ...]`, zeros in empty places."""
        B, T, *rest = x_BT.shape
        places = self.last_BP.shape[1] * self.size
        if self.place_BT is None:
            x_BT = jnp.pad(x_BT, ((0, 0), (0, max(0, places - T)), *((0, 0),) * len(rest)))
            return x_BT[:, :places].reshape(B, -1, self.size, *rest)
        token_BPs = self.last_BP[..., None] - self.size + 1 + jnp.arange(self.size)
        token_BPs = jnp.where(self.last_BP[..., None] < T, token_BPs, -1)
        return _move(x_BT, token_BPs.reshape(B, -1), self.place_BT).reshape(B, -1, self.size, *rest)

    def by_document(self, values_BCTP: jax.Array, blocks: int, stride: int = 1) -> jax.Array:
        """Takes the values at every `stride`-th piece of a query's document, `[B, C, T, J]`; zeros past the last."""
        if self.first_BT is None:
            values_BCTP = values_BCTP[..., : (blocks - 1) * stride + 1 : stride]
            return jnp.pad(values_BCTP, ((0, 0),) * 3 + ((0, blocks - values_BCTP.shape[-1]),))
        at_BTJ = self.first_BT[..., None] + stride * jnp.arange(blocks)
        return jnp.take_along_axis(values_BCTP, at_BTJ[:, None], -1, mode="fill", fill_value=0)


@jax.custom_vjp
def _move(x_BT, source_BP, target_BT):
    """Gathers x's token `source` at each place, zeros where `source` is negative.

    `target` is the place of each token. With it the gradient is a gather too, where autodiff would scatter.
    """
    B, P = source_BP.shape
    index_BP = jnp.maximum(source_BP, 0).reshape(B, P, *(1,) * (x_BT.ndim - 2))
    filled_BP = (source_BP >= 0).reshape(index_BP.shape)
    return jnp.where(filled_BP, jax.vmap(lambda x, index: x[index])(x_BT, index_BP.reshape(B, P)), 0)


_move.defvjp(
    lambda x, source, target: (_move(x, source, target), (source, target)),
    lambda plan, g: (_move(g, plan[1], plan[0]), None, None),
)


def choose(
    score_BCTJ: jax.Array,
    local_BT: jax.Array,
    size: int,
    count: int,
    first: int,
    recent: int,
    last_BT: jax.Array | None = None,
) -> jax.Array:
    """Selects `count` blocks for each query: the `first` and the `recent` ones of its document, then the best scores.

    `local_BT` is a query's place in its document; `last_BT` the last place whose block it may select, None for its own.
    Returns `[B, T, C, n]`, n = min(count, J): blocks of the document, -1 for none. The selection is a constant to the
    gradient.
    """
    block_J, current_BT1 = jnp.arange(score_BCTJ.shape[-1]), (local_BT // size)[..., None]
    past_BTJ = block_J <= current_BT1
    forced_BTJ = past_BTJ & ((block_J < first) | (block_J > current_BT1 - recent))
    allowed_BTJ = past_BTJ if last_BT is None else forced_BTJ | (block_J <= (last_BT // size)[..., None])
    score = jnp.where(allowed_BTJ[:, None], jax.lax.stop_gradient(score_BCTJ.astype(jnp.float32)), -jnp.inf)
    score = jnp.where(forced_BTJ[:, None], jnp.inf, score)
    value_BCTn, block_BCTn = jax.lax.top_k(score, min(count, score.shape[-1]))
    return jnp.swapaxes(jnp.where(value_BCTn > -jnp.inf, block_BCTn, -1), 1, 2)


def key_starts(block_BTCn: jax.Array, start_BT: jax.Array, size: int) -> jax.Array:
    """Converts selected blocks of a document to the index of their first key in the row; -1 for none."""
    return jnp.where(block_BTCn < 0, -1, start_BT[:, :, None, None] + block_BTCn * size)


def pairs(length: int, size: int, count: int, order: str) -> float:
    """Counts query-key pairs of a head that reads `count` blocks.

    A causal query reads half of its own block on average.
    """
    if order == "bidirectional":
        return length * min(length, count * size)
    index_T = np.arange(length)
    return float(np.sum(np.minimum(count - 1, index_T // size) * size + index_T % size + 0.5))
