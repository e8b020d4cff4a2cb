"""Mixture of block attention (MoBA): block-sparse attention by mean keys (Lu et al. 2025, arXiv:2502.13189).

Letters: P complete blocks of a row's documents, J blocks of a row, n selected blocks, r query heads a KV head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear
from efficientllm.mixers import block_selection, heads, kv_cache
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops.block_sparse_attention import SelectedBlocks, attend_blocks
from efficientllm.registry import build, register
from efficientllm.weights import activation_dtype


@register("mixer", "moba", example="moba(block=4, block_count=4)")
class MoBA(Mixer, kw_only=True):
    """Mixture of block attention over `block_count` blocks of `block` keys.

    A query reads its own block and the past blocks whose mean key has the largest product with it (Eq. 5 to 7). Each
    query head selects its own blocks. The selection is a constant to the gradient. In a bidirectional row a query
    selects from the complete blocks on both sides: only its own queries read an incomplete block.

    Blocks are counted from the start of each document. Means are of rotated keys, in float32. The state is the KV cache
    and the float32 sum of the keys of each block.

    Args:
      block: keys of a block.
      block_count: blocks that a query reads, its own included, as in the authors' code.
      block_kernel: `auto` or a registered `block_kernel`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str
    precision: str
    block: int = 512
    block_count: int = 3
    block_kernel: str = "auto"

    state_axes = dict.fromkeys(("k", "v", "sum"), (None, "kv_heads"))
    admits = ("heads", "embedding")  # a bias of the scores has no meaning for a mean of keys
    orders = ("causal", "bidirectional")

    def __post_init__(self):
        heads.check_groups(self)
        super().__post_init__()

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.num_kv_heads

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        (B, T, D), H, G, K = x_BTD.shape, self.num_heads, self.num_kv_heads, self.head_dim
        position = build("position", self.position, name="position")
        q_BTHK = ctx.rotate(position, heads.project(x_BTD, H, K, "heads", self.precision, "q"))
        k_BTGK = ctx.rotate(position, heads.project(x_BTD, G, K, "kv_heads", self.precision, "k"))
        v_BTGK = heads.project(x_BTD, G, K, "kv_heads", self.precision, "v")
        last_BT = None
        if state is None:
            start_BT, index_BT = block_selection.document_starts(ctx.mask, T), jnp.arange(T)[None]
            pieces = block_selection.DocumentPieces.of(ctx.mask, T, self.block)
            sum_BPGK = jnp.sum(pieces.of_tokens(k_BTGK).astype(jnp.float32), 2)
            k_BSGK, v_BSGK = k_BTGK, v_BTGK
            if ctx.mask.order == "bidirectional":
                last_BT = block_selection.document_ends(ctx.mask, T)
        else:
            start_BT, index_BT = jnp.zeros_like(ctx.positions_BT), ctx.positions_BT
            sum_BPGK = self._add(state["sum"], k_BTGK, ctx.positions_BT)
            old, new = {name: state[name] for name in "kv"}, {"k": k_BTGK, "v": v_BTGK}
            (k_BSGK, v_BSGK), _, state = kv_cache.extend(old, new, ctx.mask, ctx.positions_BT)
            state = state | {"sum": sum_BPGK}
            pieces = block_selection.DocumentPieces.of(ctx.mask, k_BSGK.shape[1], self.block)
        # Counted from the start of the document, the last token of its last complete block.
        whole_BT = None if last_BT is None else (last_BT + 1 - start_BT) // self.block * self.block - 1
        block_BTHn = self._choose(q_BTHK, sum_BPGK, pieces, index_BT - start_BT, whole_BT, k_BSGK.shape[1])
        start_BTHn = block_selection.key_starts(block_BTHn, start_BT, self.block)
        chosen = SelectedBlocks(start_BTHn, index_BT if last_BT is None else last_BT, self.block)
        # e: the heads of a token side by side, H K
        y_BTe = attend_blocks(q_BTHK, k_BSGK, v_BSGK, chosen, self.block_kernel).reshape(B, T, H * K)
        return Linear(D, ("heads", "embed"), self.precision, name="o")(y_BTe), state

    def _choose(self, q_BTHK, sum_BPGK, pieces, local_BT, last_BT, num_keys):
        B, T, H, K = q_BTHK.shape
        q_BTGrK = jax.lax.stop_gradient(q_BTHK).reshape(B, T, self.num_kv_heads, -1, K).astype(jnp.float32)
        mean_BPGK = jax.lax.stop_gradient(sum_BPGK) / self.block
        score_BGrTP = jnp.einsum("btgrk,bpgk->bgrtp", q_BTGrK, mean_BPGK)
        score_BHTJ = pieces.by_document(score_BGrTP.reshape(B, H, T, -1), self._blocks(num_keys))
        sizes = {"size": self.block, "count": self.block_count, "first": 0, "recent": 1}
        return block_selection.choose(score_BHTJ, local_BT, **sizes, last_BT=last_BT)

    def _add(self, sum_BJGK, k_BTGK, positions_BT):
        """Adds new keys to the sums of their blocks."""
        block_BTJ = (positions_BT // self.block)[..., None] == jnp.arange(sum_BJGK.shape[1])
        return sum_BJGK + jnp.einsum("btj,btgk->bjgk", block_BTJ.astype(jnp.float32), k_BTGK.astype(jnp.float32))

    def _blocks(self, length):
        return -(-length // self.block)

    def init_state(self, batch: int, length: int) -> State:
        """Returns an empty KV cache for `length` tokens a row, `[B, S, G, K]`, and zero sums, `[B, J, G, K]`."""
        shape = (self.num_kv_heads, self.head_dim)
        tokens = kv_cache.empty({"k": shape, "v": shape}, batch, length, activation_dtype(self.precision))
        return tokens | kv_cache.empty({"sum": shape}, batch, self._blocks(length), jnp.float32)

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of state of `length` tokens: 2 G K b a token, b bytes a number, and 4 G K a block."""
        itemsize = activation_dtype(self.precision).itemsize
        return self.num_kv_heads * self.head_dim * (2 * length * itemsize + 4 * self._blocks(length))

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of a query head: 4 K for a query-key pair, 2 K for a pair of a query and a mean key.

        With `executed` the count is that of the `masked` kernel. The FLOPs of other kernels depend on the selection.
        """
        means = length * length / self.block / (2 if order == "causal" else 1)
        pairs = block_selection.pairs(length, self.block, self.block_count, order)
        if executed:
            means, pairs = length * max(1, length // self.block), length * length
        return 2 * self.num_heads * self.head_dim * (2 * pairs + means)
