"""Joint attention of two streams, the patches of a picture and the tokens of a text (MMDiT).

Esser et al. 2024, arXiv:2403.03206, Section 4, as in Stable Diffusion 3 and 3.5. Letters: T patches, S tokens of the
text, N = T + S.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.mixers import heads
from efficientllm.mixers.base import Context, Mixer, State
from efficientllm.modulations.base import BOTH, Affine, ConditionVectors
from efficientllm.modulations.linear import split_branches
from efficientllm.ops.attention import Mask, attend
from efficientllm.registry import build, register

TEXT = "text"  # the text's stream in `ctx.memo`


@register("mixer", "joint", example="joint(text_length=12)")
class Joint(Mixer, kw_only=True):
    """Attention of the patches and of a text's tokens over both, each with projections of its own.

    The text is a second residual stream, which layers hand on as `ctx.memo["text"]`. This mixer has all that a layer
    does to it: norm and modulation, its part of the attention, and an ffn. Every token of the text is read, padding
    too. There are no positions beyond those of the embedding.

    Args:
      text_length: S, the tokens of a text; FLOPs are counted for so many.
      hidden: the width of the text's ffn.
      qk_norm: `head` normalizes each head of q and k, of both streams; ``""`` does not.
      norm: of queries and keys.
      text_norm: of the text's stream.
      ffn: of the text's stream.
      last: the text is read for the last time: it has keys and values, and ends.
    """

    num_heads: int
    head_dim: int
    norm: str
    precision: str
    attention_kernel: str
    hidden: int
    text_length: int = 0
    qk_norm: bool | str = ""
    text_norm: str = "layernorm(eps=1e-06, affine=False)"
    ffn: str = "gelu(kind='tanh')"
    last: bool = False

    orders = ("bidirectional",)
    recompute_elementwise = True

    def __post_init__(self):
        self.qk_norm = heads.qk_norm_kind(self)
        if self.qk_norm == "all":
            raise UserError("joint: qk_norm = 'all' is of models with one stream; take 'head'")
        super().__post_init__()

    def head_counts(self) -> tuple[int, int]:
        return self.num_heads, self.num_heads

    def init_memo(self, batch: int, length: int, dim: int) -> dict[str, jax.Array]:
        """Returns a text of zeros, which a model of texts replaces."""
        return {TEXT: jnp.zeros((batch, self.text_length, dim))}

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple:
        text_BSD, T, D = ctx.memo[TEXT], x_BTD.shape[1], x_BTD.shape[-1]
        of_attention, of_ffn = self._text_modulation(ctx, D)
        normed_BSD = of_attention.modulate(build("norm", self.text_norm, name="text_norm")(text_BSD))
        q_BTHK, *keys_and_values = self._project(x_BTD, "qkv", "", "length")
        # Parameters of the last queries of the text are in every file, and nothing reads those queries.
        names = "kv" if self.last and not self.is_initializing() else "qkv"
        *q_BSHK, k_BSHK, v_BSHK = self._project(normed_BSD, names, "text_", None)
        pairs = zip(keys_and_values, (k_BSHK, v_BSHK), strict=True)
        k_BNHK, v_BNHK = (jnp.concatenate(pair, 1) for pair in pairs)
        if self.last:
            y_BTHK = attend(q_BTHK, k_BNHK, v_BNHK, Mask.across(), self.attention_kernel)
            return self._output(y_BTHK, D, "o"), state
        q_BNHK = jnp.concatenate([q_BTHK, *q_BSHK], 1)
        y_BNHK = attend(q_BNHK, k_BNHK, v_BNHK, Mask(order="bidirectional"), self.attention_kernel)
        text_BSD = of_attention.add(text_BSD, self._output(y_BNHK[:, T:], D, "text_o"))
        normed_BSD = of_ffn.modulate(build("norm", self.text_norm, name="text_ffn_norm")(text_BSD))
        y_BSD, _ = self._text_ffn()(normed_BSD)
        return self._output(y_BNHK[:, :T], D, "o"), state, {TEXT: of_ffn.add(text_BSD, y_BSD)}

    def _text_modulation(self, ctx, dim):
        """The modulation of the text's attention and ffn; in the last layer shift and scale of the attention alone."""
        if not ctx.memo[TEXT].shape[1]:
            raise UserError("joint: reads a text, which the ends of this model do not give it; take another mixer")
        if ctx.condition_BD is None:
            raise UserError("joint: needs a conditioning vector, which this model has not; take another mixer")
        vectors = ConditionVectors(2 if self.last else 6, dim, self.precision, name="text_modulation")(ctx.condition_BD)
        if self.last:
            return Affine(shift=vectors[:, :1], scale=vectors[:, 1:]), Affine()
        return split_branches(vectors, BOTH)

    def _project(self, x_BTD, names, stream, length):
        """Those of the normalized queries, the normalized keys and the values of a stream that are in `names`."""
        axes = {f"{stream}{name}": (self.num_heads, "heads") for name in names}
        projected = heads.projections(x_BTD, axes, self.head_dim, self.precision, True, length)
        norms = {"q": self.qk_norm, "k": self.qk_norm, "v": ""}
        return [
            heads.normalize(y, norms[name], self.norm, f"{stream}{name}_norm", "heads")
            for name, y in zip(names, projected, strict=True)
        ]

    def _output(self, y_BTHK, dim, name):
        # e: the heads of a token side by side, H K
        y_BTe = y_BTHK.reshape(*y_BTHK.shape[:2], self.num_heads * self.head_dim)
        return Linear(dim, ("heads", "embed"), self.precision, True, name=name)(y_BTe)

    def _text_ffn(self):
        return build("ffn", self.ffn, {"hidden": self.hidden, "precision": self.precision}, name="text_ffn")

    def init_state(self, batch: int, length: int) -> State:
        """Returns no arrays: nothing of earlier tokens is read."""
        return {}

    def state_bytes(self, length: int) -> int:
        """Counts 0 bytes."""
        return 0

    def gathered_heads(self) -> tuple[int, int] | None:
        return self.num_heads, self.head_dim

    def hyperparameters(self) -> dict[str, Any]:
        names = (
            "num_heads",
            "head_dim",
            "hidden",
            "qk_norm",
            "text_norm",
            "ffn",
            "last",
            *["norm"] * bool(self.qk_norm),
        )
        return {name: getattr(self, name) for name in names}

    def kernel_rows(self, path: str, length: int, order: str = "bidirectional") -> int:
        """Counts a kernel's rows: one for a modulation, one a token of the text for the kernels of its stream."""
        name = path.split("/")[-2]
        if name == "text_modulation":
            return 1
        if self.last and name == "text_q":  # its queries are read by nothing
            return 0
        return self.text_length if "/text_" in path else length

    def mix_flops(self, length: int, executed: bool = False, order: str = "bidirectional") -> float:
        """Counts the forward FLOPs of scores and values: 4 H K for each pair of tokens of both streams.

        In the last layer queries are of the patches alone.
        """
        both = length + self.text_length
        mask, sizes = (Mask.across(), (length, both)) if self.last else (Mask(order="bidirectional"), (both, both))
        pairs = mask.executed_pairs(self.attention_kernel, *sizes) if executed else mask.pairs(*sizes)
        return 4 * self.num_heads * self.head_dim * pairs
