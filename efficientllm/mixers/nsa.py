"""Native sparse attention (NSA): compressed, selected and sliding-window branches (Yuan et al. 2025, arXiv:2502.11089).

Letters: d stride of compressed blocks, P pieces of d tokens, M compressed blocks, r query heads a KV head, n selected
blocks, v width of a value.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError, UserError
from efficientllm.layers import Linear
from efficientllm.mixers import block_selection, heads, kv_cache, nsa_compression
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops.attention import Mask, attend
from efficientllm.ops.block_sparse_attention import SelectedBlocks, attend_blocks
from efficientllm.registry import build, register
from efficientllm.weights import activation_dtype

BRANCHES = ("compressed", "chosen", "recent")


@register(
    "mixer",
    "nsa",
    example="nsa(compress_block=4, compress_stride=2, select_block=4, select_count=4, window=5)",
)
class NSA(Mixer, kw_only=True):
    """Native sparse attention: the gated sum of three attentions of the same queries (Eq. 5).

    Each branch has its own keys and values, and a sigmoid gate for each head and token:

    compressed: attends over blocks of `compress_block` keys, one every `compress_stride`. A small network compresses a
      block to one key (`nsa_compression.Compressor`). A block is visible from its last token on. The output is zero
      where no block is visible.
    chosen: attends over `select_count` blocks of `select_block` keys: the first block, the query's own, the one before
      it, and those with the largest weights of the compressed attention (Eq. 8 and 9, counted from 0). The query heads
      of a KV head sum their weights and select together (Eq. 10). The selection is a constant to the gradient.
    recent: attends over the last `window` tokens, the query's own included.

    Blocks are counted from the start of each document. Rotary positions rotate the queries and keys of all branches. A
    compressed key is made of unrotated keys, then rotated to the position of the first token of its block.

    In a bidirectional row every query sees every compressed block, selects from all blocks and is only sure of its own,
    and reads `window` tokens to each side. Then blocks should be of tokens that are near: squares of an image.

    The state of a row is the KV cache of the chosen branch, a ring buffer of the recent branch, the finished compressed
    blocks, and the last `compress_block` tokens, from which the next compressed blocks are made.

    Args:
      compress_block: keys of a compressed block.
      compress_stride: d.
      select_block: keys of a selected block.
      select_count: n.
      window: keys that the recent branch reads.
      attention_kernel: the kernel of the recent branch.
      block_kernel: the kernel of the chosen branch: `auto` or a registered `block_kernel`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str
    precision: str
    attention_kernel: str
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    window: int = 512
    block_kernel: str = "auto"

    state_axes = dict.fromkeys(("k", "v", "raw_k", "raw_v"), (None, "kv_heads"))
    admits = ("heads", "embedding")  # a bias of the scores has no meaning for a key made of many
    orders = ("causal", "bidirectional")

    def __post_init__(self):
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                stride = self.compress_stride
                raise UserError(f"nsa: {name} = {getattr(self, name)} is no multiple of compress_stride = {stride}")
        heads.check_groups(self)
        super().__post_init__()

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.num_kv_heads

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        (B, T, D), H, G, K = x_BTD.shape, self.num_heads, self.num_kv_heads, self.head_dim
        position = build("position", self.position, name="position")
        q_BTHK = ctx.rotate(position, heads.project(x_BTD, H, K, "heads", self.precision, "q"))
        keys, values = (
            {name: heads.project(x_BTD, G, K, "kv_heads", self.precision, f"{name}_{kind}") for name in BRANCHES}
            for kind in "kv"
        )
        for name in ("chosen", "recent"):
            keys[name] = ctx.rotate(position, keys[name])
        new = {name: {"k": keys[name], "v": values[name]} for name in BRANCHES}
        old = dict.fromkeys(BRANCHES) if state is None else state
        states = {}
        (k, v), _, states["chosen"] = kv_cache.extend(old["chosen"], new["chosen"], ctx.mask, ctx.positions_BT)
        k_BMGK, v_BMGv, layout, states["compressed"] = self._compress(new, old, ctx, position, k.shape[1])
        q_BTGrK = q_BTHK.reshape(B, T, G, H // G, K)
        y_BTGrK, block_BTGn = nsa_compression.attend(q_BTGrK, k_BMGK, v_BMGv, layout, self.select_count)
        start_BTGn = block_selection.key_starts(block_BTGn, layout.start_BT, self.select_block)
        chosen = SelectedBlocks(start_BTGn, layout.last_BT, self.select_block)
        outputs = [y_BTGrK.reshape(q_BTHK.shape), attend_blocks(q_BTHK, k, v, chosen, self.block_kernel)]
        mask = ctx.mask.replace(window=self.window)  # type: ignore[attr-defined]
        (k, v), mask, states["recent"] = kv_cache.extend(old["recent"], new["recent"], mask, ctx.positions_BT)
        outputs.append(attend(q_BTHK, k, v, mask, self.attention_kernel))
        # e: the heads of a token side by side, H K
        y_BTe = self._gated(x_BTD, outputs).reshape(B, T, H * K)
        y_BTD = Linear(D, ("heads", "embed"), self.precision, name="o")(y_BTe)
        return y_BTD, None if state is None else states

    def _gated(self, x_BTD, outputs):
        """Sums the branches' outputs `[B, T, H, K]`, each times its gate."""
        gates = Linear(3 * self.num_heads, ("embed", "heads"), self.precision, out_dtype=jnp.float32, name="gate")
        gates_BTH3 = nn.sigmoid(gates(x_BTD)).reshape(*x_BTD.shape[:2], self.num_heads, 3)
        return sum(gates_BTH3[..., i, None].astype(y.dtype) * y for i, y in enumerate(outputs))

    def _compress(self, new, old, ctx, position, num_keys):
        """Returns compressed keys and values `[B, M, G, K]`, their layout, and the new state."""
        stride, block, causal = self.compress_stride, self.compress_block, ctx.mask.order == "causal"
        networks = [nsa_compression.Compressor(block, self.precision, name=f"compress_{name}") for name in "kv"]

        def finish(k_BPdGK, v_BPdGK, begin_BM, coordinates_BMA=None):
            at_block = ctx.replace(positions_BT=begin_BM, coordinates_BTA=coordinates_BMA)
            return at_block.rotate(position, networks[0](k_BPdGK)), networks[1](v_BPdGK)

        if old["compressed"] is None:
            T = num_keys
            pieces = block_selection.DocumentPieces.of(ctx.mask, T, stride, at_least=block // stride)
            start_BT, index_BT = block_selection.document_starts(ctx.mask, T), jnp.arange(T)[None]
            last_BT = index_BT if causal else block_selection.document_ends(ctx.mask, T)
            # Block m is pieces m to m + block / d - 1: it ends with the last of them and begins d - 1 tokens before the
            # end of the first. Empty places point beyond the row, so their position is clipped; no query sees them.
            end_BM = pieces.last_BP[:, block // stride - 1 :]
            begin_BM = pieces.last_BP[:, : end_BM.shape[1]] - stride + 1
            first_BM, coordinates_BMA = jnp.clip(begin_BM, 0, T - 1), None
            position_BM = jnp.take_along_axis(ctx.positions_BT, first_BM, 1)
            if ctx.coordinates_BTA is not None:
                coordinates_BMA = jnp.take_along_axis(ctx.coordinates_BTA, first_BM[..., None], 1)
            pieces_kv = (pieces.of_tokens(new["compressed"][name]) for name in "kv")
            k, v = finish(*pieces_kv, position_BM, coordinates_BMA)
            state = None
        else:
            if position.axes > 1 and ctx.coordinates_BTA is not None:
                raise FieldError("position", "nsa decodes with positions of one axis; take a position without sections")
            state = nsa_compression.extend(old["compressed"], new["compressed"], finish, ctx.positions_BT, stride)
            k, v = state["k"], state["v"]
            pieces = block_selection.DocumentPieces.of(ctx.mask, num_keys, stride)
            start_BT, index_BT = jnp.zeros_like(ctx.positions_BT), ctx.positions_BT
            last_BT = index_BT
            begin_BM = jnp.arange(k.shape[1])[None] * stride
            end_BM = begin_BM + block - 1
        sizes = {"compress": block, "select": self.select_block, "keys": num_keys}
        rules = {"causal": causal and state is None, "forced": (1, 2) if causal else (0, 1)}
        at_query = start_BT, index_BT, last_BT
        return k, v, nsa_compression.Layout(begin_BM, end_BM, *at_query, pieces, **sizes, **rules), state

    def init_state(self, batch: int, length: int) -> State:
        """Returns empty state for `length` tokens a row; every leaf is `[B, slots, G, K]` in the activation dtype."""
        shape, dtype = (self.num_kv_heads, self.head_dim), activation_dtype(self.precision)
        of_tokens = {"k": shape, "v": shape}
        return {
            "chosen": kv_cache.empty(of_tokens, batch, length, dtype),
            "recent": kv_cache.empty(of_tokens, batch, kv_cache.slots(length, self.window), dtype),
            "compressed": nsa_compression.empty(batch, length, self.compress_block, self.compress_stride, shape, dtype),
        }

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of state of a row of `length` tokens: 2 G K b a slot, b bytes a number.

        Slots: the tokens, those of the window, the compressed blocks, and `compress_block` tokens of unfinished ones.
        """
        slots = length + kv_cache.slots(length, self.window) + self._compressed(length) + self.compress_block
        return 2 * slots * self.num_kv_heads * self.head_dim * activation_dtype(self.precision).itemsize

    def _compressed(self, length):
        return nsa_compression.count(length, self.compress_block, self.compress_stride)

    def kernel_rows(self, path: str, length: int, order: str = "causal") -> int:
        """Counts a kernel's rows: one a compressed block and KV head in a compressor, one a token elsewhere."""
        return self._compressed(length) * self.num_kv_heads if "/compress_" in path else length

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of scores and values: 4 K for a query-key pair; a compressed key is one key.

        With `executed` the chosen branch counts as the `masked` kernel; FLOPs of others depend on the selection.
        """
        return 4 * self.num_heads * self.head_dim * (self._executed if executed else self._needed)(length, order)

    def _needed(self, length, order):
        last_T = np.arange(length) if order == "causal" else np.full(length, length - 1)
        visible_T = np.maximum(0, (last_T - self.compress_block + 1) // self.compress_stride + 1)
        chosen = block_selection.pairs(length, self.select_block, self.select_count, order)
        return int(visible_T.sum()) + chosen + Mask(order=order, window=self.window).pairs(length)

    def _executed(self, length, order):
        total = self._compressed(length)
        sizes = self.compress_block, self.compress_stride, self.select_block
        chunks = nsa_compression.chunks(length, length, *sizes, total, order == "causal")
        compressed = sum((stop - start) * seen for (start, stop), seen, _ in chunks)
        recent = Mask(order=order, window=self.window).executed_pairs(self.attention_kernel, length)
        return compressed + length * length + recent
