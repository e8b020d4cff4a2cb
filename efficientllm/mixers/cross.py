"""Cross-attention: queries of the tokens, keys and values of a text (Vaswani et al. 2017, arXiv:1706.03762, 3.2.3)."""

import typing

import flax.linen as nn
import jax

from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.mixers import heads
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.ops.attention import Mask, attend
from efficientllm.registry import register


@register("mixer", "cross", example="cross(text_length=12)")
class Cross(Mixer, kw_only=True):
    """Attention of the tokens over the hidden vectors of a text, `ctx.text_BSD`, of any width.

    A token reads the text of its segment, and no padding (`Mask.across`). Neither has positions. The decode state is
    empty: keys and values are projected from the text in each pass. They depend on nothing else, so that a sampler of
    pictures projects them once a request (`request_state`).

    Args:
      text_length: S, the tokens of a text, padding included.
      qkv_bias: adds a bias to the three input projections.
      o_bias: adds a bias to the output projection.
      qk_norm: normalizes q and k: `head` each head, `all` all heads of a token together (Wan).
      input_norm: the norm of the tokens before it, where that is another than the model's. A conditioning vector does
        not modulate it: in Wan it has an affine norm, and the other branches have one without parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str
    precision: str
    attention_kernel: str
    text_length: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool | str = ""
    input_norm: str = ""

    conditioned = False
    request_kernels = ("k", "v")
    state_axes = dict.fromkeys("kv", (None, "kv_heads"))
    orders = ("causal", "bidirectional", "prefix")
    recompute_elementwise = True

    def __post_init__(self):
        self.qk_norm = heads.qk_norm_kind(self)
        heads.check_groups(self)
        super().__post_init__()

    @property
    def block_norm(self) -> str:
        return self.input_norm

    def hyperparameters(self) -> dict[str, typing.Any]:
        names = ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "o_bias", "qk_norm", "text_length", "input_norm")
        return {name: getattr(self, name) for name in (*names, *["norm"] * bool(self.qk_norm))}

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.num_kv_heads

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        (B, T, D), H, K = x_BTD.shape, self.num_heads, self.head_dim
        q_BTHK = heads.project(x_BTD, H, K, "heads", self.precision, "q", self.qkv_bias, "length")
        q_BTHK = heads.normalize(q_BTHK, self.qk_norm, self.norm, "q_norm", "heads")
        of_text = state or self._keys_and_values(ctx)
        k_BSGK, v_BSGK = of_text["k"], of_text["v"]
        mask = Mask.across(ctx.mask.segments_BT, ctx.text_segments_BS)
        # e: the heads of a token side by side, H K
        y_BTe = attend(q_BTHK, k_BSGK, v_BSGK, mask, self.attention_kernel).reshape(B, T, H * K)
        return Linear(D, ("heads", "embed"), self.precision, self.o_bias, name="o")(y_BTe), state

    @nn.compact
    def request_state(self, ctx: Context) -> State:
        """Returns the keys and values of the text, `[B, S, G, K]` each."""
        return self._keys_and_values(ctx)

    def _keys_and_values(self, ctx):
        kv_axes = dict.fromkeys("kv", (self.num_kv_heads, "kv_heads"))
        k_BSGK, v_BSGK = heads.projections(self._text(ctx), kv_axes, self.head_dim, self.precision, self.qkv_bias)
        k_BSGK = heads.normalize(k_BSGK, self.qk_norm, self.norm, "k_norm", "kv_heads")
        return {"k": k_BSGK, "v": v_BSGK}

    def _text(self, ctx):
        if ctx.text_BSD is None:
            raise UserError("cross: reads a text, which the ends of this model do not give it; take another mixer")
        if ctx.text_BSD.shape[1] != self.text_length:
            raise UserError(f"cross: text_length = {self.text_length}, and texts have {ctx.text_BSD.shape[1]} tokens")
        return ctx.text_BSD

    def init_state(self, batch: int, length: int) -> State:
        """Returns no arrays: nothing of earlier tokens is read."""
        return {}

    def state_bytes(self, length: int) -> int:
        """Counts 0 bytes."""
        return 0

    def kernel_rows(self, path: str, length: int, order: str = "causal") -> int:
        """Counts a kernel's rows: one a token of the text for keys and values."""
        return self.text_length if path.endswith(("/k/kernel", "/v/kernel")) else length

    def mix_flops(self, length: int, executed: bool = False, order: str = "causal") -> float:
        """Counts the forward FLOPs of scores and values: 4 H K for each pair of a token and a token of the text."""
        mask, sizes = Mask.across(), (length, self.text_length)
        pairs = mask.executed_pairs(self.attention_kernel, *sizes) if executed else mask.pairs(*sizes)
        return 4 * self.num_heads * self.head_dim * pairs
