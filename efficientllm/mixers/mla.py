"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, Section 2.1): keys and values from one small latent.

Letters: R rank of the latent, N width of a head without positions, P width of the rotated part, V width of a value.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear, RMSNorm
from efficientllm.mixers import kv_cache as cache
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops.attention import attend, causal_pairs, executed_pairs
from efficientllm.ops.int8_kv_cache import as_array
from efficientllm.registry import build, register
from efficientllm.sharding import constrain
from efficientllm.weights import dense


@register("mixer", "mla")
class MLA(Mixer, kw_only=True):
    """Every head's key and value are products of a latent of `kv_rank`; a key of `rope_dim` that all heads share
    carries the position.

    State is the latent and that shared key (Eq. 9, 15). One token at a time, the products that would expand them are
    taken with queries and outputs instead (the absorbed form of Section 2.1.2).

    Args:
      head_dim: N, width of a head without positions.
      kv_rank: R; None is 4 x head_dim, as in DeepSeek-V2 and V3.
      q_rank: rank of the queries' own latent; None projects queries at once (DeepSeek-V2-Lite).
      rope_dim: P; None is head_dim / 2.
      v_dim: V; None is head_dim.
      kv_cache: how the state is kept (`cache.KINDS`).

    Latents pass an RMS norm of eps 1e-6, whatever the model's, as in DeepSeek's code.
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
    admits = ("heads", "scores", "embedding")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """(R, N, P, V)."""
        n = self.head_dim
        return self.kv_rank or 4 * n, n, self.rope_dim or n // 2, self.v_dim or n

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
        q_BTHe = self._queries(x_BTD).reshape(B, T, self.num_heads, n + P)
        q_BTHe = constrain(q_BTHe, "batch", "length", "heads", None)
        q_BTHn, q_BTHP = q_BTHe[..., :n], ctx.rotate(position, q_BTHe[..., n:])
        latent_BTe = Linear(R + P, ("embed", None), self.precision, name="kv_a")(x_BTD)
        latent_BTR = RMSNorm(1e-6, axis=None, name="kv_norm")(latent_BTe[..., :R])
        k_BTP = ctx.rotate(position, latent_BTe[:, :, None, R:])[:, :, 0]
        new = {"latent": latent_BTR, "rotated": k_BTP}
        (latent_BSR, k_BSP), mask, state = cache.extend(state, new, ctx.mask, ctx.positions_BT)
        up = Linear(self.num_heads * (n + v), ("embed", "heads"), self.precision, name="kv_b")
        options = {"bias": position.bias(self.num_heads), "scale": (n + P) ** -0.5 * position.score_scale()}
        form = self._absorbed if state is not None and T == 1 else self._expanded
        y_BTHv = form(q_BTHn, q_BTHP, latent_BSR, k_BSP, up, mask, options)
        y_BTe = y_BTHv.reshape(B, T, self.num_heads * v)
        return Linear(D, ("heads", "embed"), self.precision, name="o")(y_BTe), state

    def _queries(self, x_BTD):
        _, n, P, _ = self.widths
        if self.q_rank:
            latent = Linear(self.q_rank, ("embed", None), self.precision, name="q_a")(x_BTD)
            x_BTD = RMSNorm(1e-6, axis=None, name="q_norm")(latent)
        name = "q_b" if self.q_rank else "q"
        return Linear(self.num_heads * (n + P), ("embed", "heads"), self.precision, name=name)(x_BTD)

    def _expanded(self, q_BTHn, q_BTHP, latent_BSR, k_BSP, up, mask, options):
        """Keys and values of every head, made from the latents."""
        _, n, P, v = self.widths
        latent_BSR, k_BSP = (as_array(leaf, q_BTHn.dtype) for leaf in (latent_BSR, k_BSP))
        B, S, _ = latent_BSR.shape
        kv_BSHe = constrain(up(latent_BSR).reshape(B, S, self.num_heads, n + v), "batch", "length", "heads", None)
        shared_BSHP = jnp.broadcast_to(k_BSP[:, :, None], (B, S, self.num_heads, P))
        q_BTHK = jnp.concatenate([q_BTHn, q_BTHP], -1)
        k_BSHK = jnp.concatenate([kv_BSHe[..., :n], shared_BSHP], -1)
        return attend(q_BTHK, k_BSHK, kv_BSHe[..., n:], mask, self.attention_kernel, **options)

    def _absorbed(self, q_BTHn, q_BTHP, latent_BSR, k_BSP, up, mask, options):
        """All heads read one key, the latent beside the shared key, and one value, the latent."""
        R, n, _, v = self.widths
        kernel_RHe = dense(up.variables["params"]["kernel"], after=q_BTHn).astype(q_BTHn.dtype)
        kernel_RHe = kernel_RHe.reshape(R, self.num_heads, n + v)
        q_BTHR = jnp.einsum("bthn,rhn->bthr", q_BTHn, kernel_RHe[..., :n])
        q_BTHK = jnp.concatenate([q_BTHR, q_BTHP], -1)
        latent_BS1R, k_BS1P = jax.tree.map(lambda leaf: leaf[:, :, None], (latent_BSR, k_BSP))  # of one KV head
        y_BTHR = attend(q_BTHK, (latent_BS1R, k_BS1P), latent_BS1R, mask, self.attention_kernel, **options)
        return jnp.einsum("bthr,rhv->bthv", y_BTHR, kernel_RHe[..., n:])

    def init_state(self, batch: int, length: int) -> State:
        """Empty latents and shared keys for `length` tokens a row, `[B, S, R]` and `[B, S, P]`."""
        return cache.empty(self._slot, batch, length, cache.dtype(self.kv_cache, self.precision))

    def state_bytes(self, length: int) -> int:
        """Bytes of state a row of `length` tokens holds: (R + P) b a token; in int8 R + P + 8."""
        return length * cache.slot_bytes(self._slot, cache.dtype(self.kv_cache, self.precision))

    @property
    def _slot(self):
        R, _, P, _ = self.widths
        return {"latent": (R,), "rotated": (P,)}

    def mix_flops(self, length: int, executed: bool = False) -> float:
        """As Attention's, with heads of N + P in the scores and V in the values."""
        _, n, P, v = self.widths
        pairs = executed_pairs(self.attention_kernel, length) if executed else causal_pairs(length)
        return 2 * self.num_heads * (n + P + v) * pairs
