"""Multi-head, multi-query and grouped-query attention: one module, three counts of KV heads.

MHA: Vaswani et al. 2017, arXiv:1706.03762. MQA: Shazeer 2019, arXiv:1911.02150. GQA: Ainslie et al. 2023,
arXiv:2305.13245.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.attention import attend
from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.registry import build, register
from efficientllm.sharding import constrain
from efficientllm.weights import activation_dtype


class Attention(nn.Module, kw_only=True):
    """Attention of H query heads over `kv_heads` KV heads.

    `qkv_bias` adds a bias to the three input projections (Qwen2), `qk_norm` norms each head of q and k before the
    rotation (Qwen3).
    """

    num_heads: int
    head_dim: int
    position: str
    norm: str
    precision: str
    attention_kernel: str
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def kv_heads(self):
        raise TypeError(f"{type(self).__name__} does not say how many KV heads it has")

    @nn.compact
    def __call__(self, x_BTD, ctx, state=None):
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        position = build("position", self.position, name="position")
        q_BTHK = self._project(x_BTD, "q", H, "heads")
        k_BTGK = self._project(x_BTD, "k", G, "kv_heads")
        v_BTGK = self._project(x_BTD, "v", G, "kv_heads")
        if self.qk_norm:
            q_BTHK = build("norm", self.norm, name="q_norm", axis=None)(q_BTHK)
            k_BTGK = build("norm", self.norm, name="k_norm", axis=None)(k_BTGK)
        q_BTHK, k_BTGK = position.rotate(q_BTHK, ctx.positions_BT), position.rotate(k_BTGK, ctx.positions_BT)
        if state is not None:
            state = {"k": _store(state["k"], k_BTGK, ctx), "v": _store(state["v"], v_BTGK, ctx)}
            k_BTGK, v_BTGK = state["k"], state["v"]
        y_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, ctx.mask, self.attention_kernel)
        y_BTD = y_BTHK.reshape(*x_BTD.shape[:2], H * K)
        return Linear(x_BTD.shape[-1], ("heads", "embed"), self.precision, name="o")(y_BTD), state

    def _project(self, x_BTD, name, heads, axis):
        linear = Linear(heads * self.head_dim, ("embed", axis), self.precision, self.qkv_bias, name=name)
        # Heads that do not divide over `tensor` stay whole: split ones would be put together for every rotation.
        return constrain(linear(x_BTD).reshape(*x_BTD.shape[:2], heads, self.head_dim), "batch", None, axis, None)

    def init_state(self, batch, length):
        """An empty KV cache for `length` tokens a row: k and v `[B, S, G, K]` in the activation dtype."""
        shape = (batch, length, self.kv_heads, self.head_dim)
        return {name: jnp.zeros(shape, activation_dtype(self.precision)) for name in ("k", "v")}

    def state_bytes(self, length):
        """Bytes of state a row of `length` tokens holds: 2 G K b a token."""
        return 2 * length * self.kv_heads * self.head_dim * activation_dtype(self.precision).itemsize

    def mix_flops(self, pairs):
        """Forward FLOPs beyond the kernels' for `pairs` query-key pairs: scores and values, 2 H K each."""
        return 4 * self.num_heads * self.head_dim * pairs


def _store(cache_BSGK, new_BTGK, ctx):
    """Writes each row's tokens into the slots from that row's first position on."""
    write = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice_in_dim(cache, new, start, 0))
    return write(cache_BSGK, new_BTGK.astype(cache_BSGK.dtype), ctx.positions_BT[:, 0])


@register("mixer", "mha")
class MHA(Attention, kw_only=True):
    """Every query head has a KV head of its own."""

    @property
    def kv_heads(self):
        return self.num_heads


@register("mixer", "mqa")
class MQA(Attention, kw_only=True):
    """All query heads share one KV head."""

    @property
    def kv_heads(self):
        return 1


@register("mixer", "gqa")
class GQA(Attention, kw_only=True):
    """`num_heads / num_kv_heads` query heads share a KV head."""

    num_kv_heads: int

    def __post_init__(self):
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(f"gqa: num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}")
        super().__post_init__()

    @property
    def kv_heads(self):
        return self.num_kv_heads
