"""Multi-head latent attention (MLA): keys and values from one low-rank latent (DeepSeek-V2, arXiv:2405.04434, 2.1).

Letters: R rank of the latent, n width of a head without positions, P width of the rotated part, v width of a value, e
concatenated axes (named where they are made).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear, RMSNorm
from efficientllm.mixers import kv_cache as cache
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops import native
from efficientllm.ops.attention import Mask, attend
from efficientllm.ops.int8_kv_cache import as_array
from efficientllm.registry import build, register
from efficientllm.sharding import constrain
from efficientllm.weights import Weight, dense


@register("mixer", "mla")
class MLA(Mixer, kw_only=True):
    """Multi-head latent attention.

    Keys and values of all heads are projections of one latent of `kv_rank`. A key of `rope_dim`, shared by all heads,
    carries the position. The KV cache holds the latent and the shared key (Eq. 9, 15). Decoding multiplies the queries
    and the outputs by the up-projection in place of the cache (the absorbed form of Section 2.1.2).

    Args:
      head_dim: n, width of a head without positions.
      kv_rank: R; None is 4 x head_dim, as in DeepSeek-V2 and V3.
      q_rank: rank of the latent of queries; None projects queries directly (DeepSeek-V2-Lite).
      rope_dim: P; None is head_dim / 2. With 0 nothing is rotated, and there is no shared key.
      v_dim: v; None is head_dim.
      kv_cache: the storage of the KV cache, one of `kv_cache.KINDS`.

    The RMS norms of latents have eps 1e-6 whatever the model's eps, as in DeepSeek's code.
    """

    num_heads: int
    head_dim: int
    position: str
    precision: str
    attention_kernel: str
    kv_rank: int = None
    q_rank: int = None
    rope_dim: int = None
    v_dim: int = None
    kv_cache: str = "activation"

    family = "mla"
    orders = ("causal", "bidirectional", "prefix")
    admits = ("heads", "scores", "embedding")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """The widths (R, n, P, v)."""
        n = self.head_dim
        return self.kv_rank or 4 * n, n, n // 2 if self.rope_dim is None else self.rope_dim, self.v_dim or n

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.num_heads

    def hyperparameters(self) -> dict[str, Any]:
        ranks = dict(zip(("kv_rank", "head_dim", "rope_dim", "v_dim"), self.widths, strict=True))
        return ranks | {"num_heads": self.num_heads, "q_rank": self.q_rank or None, "position": self.position}

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        R, n, P, v = self.widths
        B, T, D = x_BTD.shape
        position = build("position", self.position, name="position")
        # e: a head's part without positions beside its rotated part, n + P
        q_BTHe = self._queries(x_BTD).reshape(B, T, self.num_heads, n + P)
        q_BTHe = constrain(q_BTHe, "batch", "length", "heads", None)
        # e: the latent beside the shared key, R + P
        latent_BTe = Linear(R + P, ("embed", None), self.precision, name="kv_a")(x_BTD)
        new = {"latent": RMSNorm(1e-6, axis=None, name="kv_norm")(latent_BTe[..., :R])}
        if P:
            q_BTHe = jnp.concatenate([q_BTHe[..., :n], ctx.rotate(position, q_BTHe[..., n:])], -1)
            new["rotated"] = ctx.rotate(position, latent_BTe[:, :, None, R:])[:, :, 0]
        (latent_BSR, *shared), mask, state = cache.extend(state, new, ctx.mask, ctx.positions_BT)
        up = Linear(self.num_heads * (n + v), ("embed", "heads"), self.precision, name="kv_b")
        options = {"bias": ctx.bias(position, self.num_heads), "scale": (n + P) ** -0.5 * position.score_scale()}
        form = self._absorbed if state is not None and T == 1 else self._expanded
        y_BTHv = form(q_BTHe, latent_BSR, shared, up, mask, options)
        # e: the heads of a token side by side, H v
        y_BTe = y_BTHv.reshape(B, T, self.num_heads * v)
        return Linear(D, ("heads", "embed"), self.precision, name="o")(y_BTe), state

    def _queries(self, x_BTD):
        _, n, P, _ = self.widths
        if self.q_rank:
            latent = Linear(self.q_rank, ("embed", None), self.precision, name="q_a")(x_BTD)
            x_BTD = RMSNorm(1e-6, axis=None, name="q_norm")(latent)
        name = "q_b" if self.q_rank else "q"
        return Linear(self.num_heads * (n + P), ("embed", "heads"), self.precision, name=name)(x_BTD)

    def _expanded(self, q_BTHK, latent_BSR, shared, up, mask, options):
        """Attends over keys and values of every head, expanded from the latents; e is a key beside a value, n + v.

        `shared` holds the shared key `[B, S, P]`, if there is one.
        """
        _, n, P, v = self.widths
        latent_BSR, *shared = (as_array(leaf, q_BTHK.dtype) for leaf in (latent_BSR, *shared))
        B, S, _ = latent_BSR.shape
        kv_BSHe = constrain(up(latent_BSR).reshape(B, S, self.num_heads, n + v), "batch", "length", "heads", None)
        shared = [jnp.broadcast_to(k_BSP[:, :, None], (B, S, self.num_heads, P)) for k_BSP in shared]
        k_BSHK = jnp.concatenate([kv_BSHe[..., :n], *shared], -1)
        return attend(q_BTHK, k_BSHK, kv_BSHe[..., n:], mask, self.attention_kernel, **options)

    def _absorbed(self, q_BTHK, latent_BSR, shared, up, mask, options):
        """Attends over the latents: every head reads one key (latent and shared key) and one value (latent).

        With W_k, W_v the halves of the up-projection, q (W_k c) = (q W_k) c and sum p (W_v c) = W_v (sum p c): the
        up-projection multiplies one query and one output in place of S latents c.
        """
        _, n, _, v = self.widths
        kernel = up.variables["params"]["kernel"]
        q_BTHR = self._by_head(q_BTHK[..., :n], kernel, slice(0, n), over_rank=False)
        q_BTHK = jnp.concatenate([q_BTHR, q_BTHK[..., n:]], -1)
        y_BTHR = attend(q_BTHK, (latent_BSR, *shared), latent_BSR, mask, self.attention_kernel, **options)
        return self._by_head(y_BTHR, kernel, slice(n, n + v), over_rank=True)

    def _by_head(self, x_BTHj, kernel, part, over_rank):
        """Multiplies a vector of each head with some columns of its part of the up-projection, or their transpose."""
        H, dtype = self.num_heads, x_BTHj.dtype
        R, n, _, v = self.widths
        if native.is_usable():
            rows = kernel.stored_rows() if isinstance(kernel, Weight) else None
            weights = dense(kernel, after=x_BTHj) if rows is None else rows
            product = native.head_products(x_BTHj[:, 0], weights, part, n + v, over_rank, rows is not None)
            return product[:, None].astype(dtype)
        kernel_RHe = dense(kernel, after=x_BTHj).astype(dtype).reshape(R, H, n + v)[..., part]
        return jnp.einsum("bthr,rhv->bthv" if over_rank else "bthn,rhn->bthr", x_BTHj, kernel_RHe)

    def init_state(self, batch: int, length: int) -> State:
        """Returns an empty cache for `length` tokens a row: latents `[B, S, R]` and shared keys `[B, S, P]`."""
        return cache.empty(self._slot, batch, length, cache.dtype(self.kv_cache, self.precision))

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of a cache of `length` tokens: (R + P) b a token, b bytes a number; R + P + 8 in int8."""
        return length * cache.slot_bytes(self._slot, cache.dtype(self.kv_cache, self.precision))

    @property
    def _slot(self):
        R, _, P, _ = self.widths
        return {"latent": (R,)} | ({"rotated": (P,)} if P else {})

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of scores and values: 2 H (n + P + v) for a query-key pair; see `Attention`."""
        _, n, P, v = self.widths
        mask = Mask(order=order)
        pairs = mask.executed_pairs(self.attention_kernel, length) if executed else mask.pairs(length)
        return 2 * self.num_heads * (n + P + v) * pairs
