"""Multi-head (MHA), multi-query (MQA), grouped-query (GQA) and sliding-window attention.

MHA: Vaswani et al. 2017, arXiv:1706.03762. MQA: Shazeer 2019, arXiv:1911.02150. GQA: Ainslie et al. 2023,
arXiv:2305.13245. Window: Beltagy et al. 2020, arXiv:2004.05150.
"""

from typing import Any

import flax.linen as nn
import jax

from efficientllm.layers import Linear
from efficientllm.mixers import heads
from efficientllm.mixers import kv_cache as cache
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops.attention import Mask, attend
from efficientllm.registry import build, register


class Attention(Mixer, kw_only=True):
    """Attention of H query heads over `kv_heads` KV heads.

    Args:
      qkv_bias: adds a bias to the three input projections (Qwen2).
      o_bias: adds a bias to the output projection (Pythia).
      qk_norm: normalizes q and k before the rotation: `head` each head (Qwen3; also True), `all` all heads of a token
        together (Wan, InternViT).
      score_scale: the factor of the scores; 0 is K^-1/2, and T5 has 1.
      kv_cache: the storage of the KV cache, one of `kv_cache.KINDS`.
    """

    num_heads: int
    head_dim: int
    position: str
    norm: str
    precision: str
    attention_kernel: str
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool | str = ""
    kv_cache: str = "activation"
    score_scale: float = 0.0

    admits = ("heads", "scores", "embedding")  # where a position may act; see positions/
    orders = ("causal", "bidirectional", "prefix")
    recompute_elementwise = True
    state_axes = dict.fromkeys("kv", (None, "kv_heads"))
    keys_read = None  # tokens that a query reads, itself included; None reads all

    def __post_init__(self):
        self.qk_norm = heads.qk_norm_kind(self)
        super().__post_init__()

    @property
    def kv_heads(self) -> int:
        """G, the number of KV heads."""
        raise TypeError(f"{type(self).__name__} defines no kv_heads")

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        H, G = self.num_heads, self.kv_heads
        position = build("position", self.position, name="position")
        head_axes = {"q": (H, "heads"), "k": (G, "kv_heads"), "v": (G, "kv_heads")}
        projected = heads.projections(x_BTD, head_axes, self.head_dim, self.precision, self.qkv_bias, "length")
        q_BTHK, k_BTGK, v_BTGK = projected
        q_BTHK = heads.normalize(q_BTHK, self.qk_norm, self.norm, "q_norm", "heads")
        k_BTGK = heads.normalize(k_BTGK, self.qk_norm, self.norm, "k_norm", "kv_heads")
        q_BTHK, k_BTGK = ctx.rotate(position, q_BTHK), ctx.rotate(position, k_BTGK)
        mask = ctx.mask.replace(window=self.keys_read)  # type: ignore[attr-defined]
        (k_BSGK, v_BSGK), mask, state = cache.extend(state, {"k": k_BTGK, "v": v_BTGK}, mask, ctx.positions_BT)
        bias, scale = ctx.bias(position, H), self.score_scale or None
        y_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, mask, self.attention_kernel, bias, scale)
        return self.combine(y_BTHK, x_BTD), state

    def gathered_heads(self) -> tuple[int, int] | None:
        return self.kv_heads, self.head_dim

    def hyperparameters(self) -> dict[str, Any]:
        names = ("num_heads", "head_dim", "qkv_bias", "o_bias", "qk_norm", "score_scale", "position")
        fields = {name: getattr(self, name) for name in (*names, *["norm"] * bool(self.qk_norm))}
        return fields | {"num_kv_heads": self.kv_heads, "window": self.keys_read}

    def combine(self, y_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Projects the outputs of the heads to the mixer's output `[B, T, D]`; `x_BTD` is the mixer's input."""
        # e: the heads of a token side by side, H K
        y_BTe = y_BTHK.reshape(*x_BTD.shape[:2], self.num_heads * self.head_dim)
        return Linear(x_BTD.shape[-1], ("heads", "embed"), self.precision, self.o_bias, name="o")(y_BTe)

    def init_state(self, batch: int, length: int) -> State:
        """Returns an empty KV cache for `length` tokens a row: k and v `[B, S, G, K]` in the dtype of `kv_cache`."""
        slots = cache.slots(length, self.keys_read)
        return cache.empty(self._slot, batch, slots, cache.dtype(self.kv_cache, self.precision))

    def state_bytes(self, length: int) -> int:
        """Counts the bytes of a KV cache of `length` tokens: 2 G K b a slot, b bytes a number; 2 G (K + 4) in int8."""
        slots = cache.slots(length, self.keys_read)
        return slots * cache.slot_bytes(self._slot, cache.dtype(self.kv_cache, self.precision))

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.kv_heads

    @property
    def _slot(self):
        return dict.fromkeys("kv", (self.kv_heads, self.head_dim))

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of scores and values for a row of `length` tokens: 2 H K each for a query-key pair.

        The pairs are those of the mask (`Mask.pairs`), or with `executed` those that the kernel computes.
        """
        mask = Mask(order=order, window=self.keys_read)
        pairs = mask.executed_pairs(self.attention_kernel, length) if executed else mask.pairs(length)
        return 4 * self.num_heads * self.head_dim * pairs


@register("mixer", "mha")
class MHA(Attention, kw_only=True):
    """Multi-head attention: every query head has its own KV head."""

    family = "attention"

    @property
    def kv_heads(self) -> int:
        return self.num_heads


@register("mixer", "mqa")
class MQA(Attention, kw_only=True):
    """Multi-query attention: all query heads share one KV head."""

    family = "attention"

    @property
    def kv_heads(self) -> int:
        return 1


@register("mixer", "gqa")
class GQA(Attention, kw_only=True):
    """Grouped-query attention: `num_heads / num_kv_heads` query heads share a KV head."""

    family = "attention"
    num_kv_heads: int

    def __post_init__(self):
        heads.check_groups(self)
        super().__post_init__()

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads


@register("mixer", "window", example="window(window=5)")
class Window(GQA, kw_only=True):
    """Sliding-window attention: a query reads the last `window` tokens, itself included.

    In a bidirectional row it reads as many after itself. The KV cache is a ring buffer of `window` slots.
    """

    family = "attention"
    window: int

    @property
    def keys_read(self) -> int:
        return self.window
