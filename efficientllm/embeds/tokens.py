"""Language model: token embedding, blocks, norm, logits."""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.embeds.base import Ends
from efficientllm.errors import FieldError
from efficientllm.layers import Linear
from efficientllm.model import Backbone
from efficientllm.ops.attention import Context
from efficientllm.ops.embedding_lookup import look_up
from efficientllm.registry import build, register
from efficientllm.sharding import constrain
from efficientllm.typing import Batch, Config, Params, PyTree
from efficientllm.weights import Precision, Weight, matmul, parameter, transposed_kernel

HEAD = ("embed", "vocab")


class RowArray(typing.NamedTuple):
    """An array of a batch: that of one row, without the axis of rows, and its logical axes."""

    row: jax.ShapeDtypeStruct
    axes: tuple[str | None, ...]


class LM(Backbone, kw_only=True):
    """A decoder-only language model.

    Args:
      tied: the output projection is the embedding, transposed.
      embed_norm: a norm follows the embedding (RWKV, BLOOM).
    """

    vocab_size: int
    tied: bool
    embed_norm: bool

    reads: typing.ClassVar[str] = "text"

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        ctx: Context,
        states: PyTree | None = None,
        readout: bool = True,
        groups: bool = True,
    ) -> tuple:
        """Returns float32 logits `[B, T, V]`, the new states (None without states) and aux stacked over groups.

        Without `readout` the last hidden vectors `[B, T, D]` stand in place of the logits. Without `groups` the result
        is the carry of the first group (`embed`).
        """
        precision = Precision.of(self.precision)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding_VD = parameter(self, "embedding", init, (self.vocab_size, self.dim))
        x_BTD = self.place_images(look_up(embedding_VD, tokens_BT, precision.activation), ctx)
        position = build("position", self.position, name="position")
        x_BTD = position.embed(x_BTD, ctx.positions_BT)
        if self.embed_norm:
            x_BTD = build("norm", self.norm, name="embed_norm")(x_BTD)
        carry = x_BTD, self.init_memo(*tokens_BT.shape, position)
        if not groups:
            return carry
        x_BTD, states, aux = self.apply_blocks(carry, ctx, states)
        x_BTD = build("norm", self.norm, name="norm")(x_BTD)
        if not readout:
            return x_BTD, states, aux
        if self.tied:
            logits_BTV = matmul(x_BTD, transposed_kernel(embedding_VD), precision, jnp.float32, HEAD)
        else:
            head = Linear(self.vocab_size, HEAD, precision, out_dtype=jnp.float32, name="head")
            logits_BTV = head(x_BTD)
        return constrain(logits_BTV, "batch", "length", "vocab"), states, aux

    def place_images(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """Puts features of images into the slots of their tokens, where a model reads images."""
        return x_BTD

    def image_arrays(self, length: int) -> dict[str, RowArray]:
        """Returns the arrays of a training batch that say which images a row of `length` tokens has."""
        return {}

    def context(self, batch: Batch) -> Context:
        """Builds the Context of a training batch's packed rows."""
        return Context.packed(batch["positions"], batch["segments"])

    def example(self, length: int) -> tuple:
        tokens_BT = jnp.zeros((1, length), jnp.int32)
        return tokens_BT, Context.packed(tokens_BT)

    def shared_head_flops(self, length: int) -> float:
        return 2 * length * self.dim * self.vocab_size if self.tied else 0


@register("embed", "tokens")
@dataclasses.dataclass(frozen=True)
class Tokens(Ends):
    """Token ids in, logits out; `config.model.tied` and `config.model.embed_norm` are its options."""

    reads: typing.ClassVar[str] = LM.reads
    # What stands for a tokenizer where models are only compared.
    unknown: typing.ClassVar[int] = 8

    def is_complete(self, size: typing.Any) -> bool:
        """Whether a size says all that the model needs to know of its data: the vocabulary."""
        return size.vocab_size is not None

    def model(self, backbone: dict[str, typing.Any], model: Config, size: typing.Any, vocab_size: int | None) -> LM:
        """Builds the model of `config.model` from the fields of its `backbone`, for a tokenizer of `vocab_size`."""
        return LM(**self.fields(backbone, model, size, vocab_size))

    def fields(
        self, backbone: dict[str, typing.Any], model: Config, size: typing.Any, vocab_size: int | None
    ) -> dict[str, typing.Any]:
        """Returns the fields of the language model; see `model`."""
        if None not in (size.vocab_size, vocab_size) and vocab_size > size.vocab_size:
            raise FieldError(
                "tokenizer",
                f"has {vocab_size} tokens, the vocabulary of config.model.size {size.vocab_size}; choose a smaller one",
            )
        vocab_size = vocab_size if size.vocab_size is None else size.vocab_size
        return backbone | {"vocab_size": vocab_size, "tied": model.tied, "embed_norm": model.embed_norm}


def embed(lm: LM, params: Params, tokens_BT: jax.Array, ctx: Context) -> tuple:
    """Returns the carry of the first group, `(x_BTD, memo)`: embedded tokens, and what mixers find in `ctx.memo`."""
    return lm.apply({"params": params}, tokens_BT, ctx, groups=False)


def head_kernel(lm: LM, params: Params) -> jax.Array | Weight:
    """Returns the output projection `[D, V]`."""
    return transposed_kernel(params["embedding"]) if lm.tied else params["head"]["kernel"]


def read_out(lm: LM, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Computes float32 logits `[B, T, V]` from last hidden vectors, the model's output without `readout`."""
    return matmul(x_BTD, head_kernel(lm, params), lm.precision, jnp.float32, HEAD)
