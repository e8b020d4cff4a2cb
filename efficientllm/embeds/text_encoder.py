"""Text encoder: token ids in, hidden vectors of all tokens out, and a vector of the whole text.

T5 (Raffel et al. 2019, arXiv:1910.10683) and UMT5 (Chung et al. 2023, arXiv:2304.09151) read in both directions, the
texts of CLIP (Radford et al. 2021, arXiv:2103.00020) are causal.
"""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.embeds.base import Ends
from efficientllm.errors import FieldError
from efficientllm.layers import Linear
from efficientllm.model import Backbone, check_length
from efficientllm.model.blocks import GROUP_INPUT
from efficientllm.ops.attention import Context, Mask
from efficientllm.ops.embedding_lookup import look_up
from efficientllm.registry import build, register
from efficientllm.typing import Config
from efficientllm.weights import Precision, parameter

LARGEST = -1  # in place of an end token's id: the largest id of a row is its end


class EncodedText(typing.NamedTuple):
    """Float hidden vectors of tokens `[B, T, D]`, and vectors of whole texts `[B, projection]` or None."""

    states_BTD: jax.Array
    pooled_BD: jax.Array | None


class TextEncoder(Backbone, kw_only=True):
    """An encoder of texts.

    Args:
      causal: whether tokens read only those before them.
      skip: which hidden vectors are returned: 0, the last after the final norm; 1, those that the last group of blocks
        reads, without the norm (CLIP in Stable Diffusion).
      end_id: the token at whose first occurrence the last hidden vector stands for the text; -1 is the largest id of a
        row, as in CLIP's first files. None: there is no vector of the text.
      projection: the features of that vector, by a product without bias; 0: it is not projected.
    """

    vocab_size: int
    causal: bool
    skip: int
    end_id: int | None
    projection: int

    reads: typing.ClassVar[str] = "prompts"
    behind_blocks: typing.ClassVar[tuple[str, ...]] = ("norm", "projection")

    @property
    def order(self) -> str:  # type: ignore[override]
        return "causal" if self.causal else "bidirectional"

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, real_BT: jax.Array | None = None) -> EncodedText:
        """Encodes texts; no token reads those where `real_BT` is False, which is padding. None reads all.

        Raises UserError for more tokens than the position has.
        """
        check_length(self, tokens_BT.shape[1], "a text")
        precision, ctx = Precision.of(self.precision), self._context(tokens_BT, real_BT)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding_VD = parameter(self, "embedding", init, (self.vocab_size, self.dim))
        position = build("position", self.position, name="position")
        x_BTD = position.embed(look_up(embedding_VD, tokens_BT, precision.activation), ctx.positions_BT)
        memo = self.init_memo(*tokens_BT.shape, position) | ({GROUP_INPUT: x_BTD} if self.skip else {})
        (x_BTD, memo), _, _ = self.apply_groups((x_BTD, memo), ctx, None)
        x_BTD = build("norm", self.norm, name="norm")(x_BTD)
        return EncodedText(memo[GROUP_INPUT] if self.skip else x_BTD, self._pool(x_BTD, tokens_BT))

    def _context(self, tokens_BT, real_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if real_BT is None:
            return Context(positions_BT, Mask(order=self.order))
        # Padding reads the text, as in the references, though nobody reads padding.
        segments_BT, of_text_BT = real_BT.astype(jnp.int32), jnp.ones_like(tokens_BT)
        return Context(positions_BT, Mask(segments_BT, order=self.order, query_segments_BT=of_text_BT))

    def _pool(self, x_BTD, tokens_BT):
        if self.end_id is None:
            return None
        score_BT = tokens_BT if self.end_id == LARGEST else tokens_BT == self.end_id
        pooled_BD = jnp.take_along_axis(x_BTD, jnp.argmax(score_BT, 1)[:, None, None], 1)[:, 0]
        if not self.projection:
            return pooled_BD
        return Linear(self.projection, ("embed", None), self.precision, name="projection")(pooled_BD)

    def example(self, length: int) -> tuple:
        return (jnp.zeros((1, length), jnp.int32),)

    def kernel_rows(self, path: str, length: int) -> int:
        return 1 if path.startswith("projection/") else length


@register("embed", "text_encoder")
@dataclasses.dataclass(frozen=True)
class TextEncoderEnds(Ends):
    """Token ids in, hidden vectors out; see `TextEncoder`."""

    causal: bool = False
    skip: int = 0
    end_id: int = None
    projection: int = 0

    reads: typing.ClassVar[str] = TextEncoder.reads
    unknown: typing.ClassVar[int] = 8

    def is_complete(self, size: typing.Any) -> bool:
        """Whether a size says all that the model needs to know of its data: the vocabulary."""
        return size.vocab_size is not None

    def model(
        self, backbone: dict[str, typing.Any], model: Config, size: typing.Any, vocab_size: int | None
    ) -> TextEncoder:
        """Builds the model of `config.model` from the fields of its `backbone`, for a tokenizer of `vocab_size`."""
        vocab_size = vocab_size if size.vocab_size is None else size.vocab_size
        if self.projection and self.end_id is None:
            raise FieldError("embed", f"projection = {self.projection} projects the vector of a text: give its end_id")
        return TextEncoder(**backbone, vocab_size=vocab_size, **dataclasses.asdict(self))
