"""Layers that embed a noise level and a `Condition` into the conditioning vector of a diffusion transformer."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.layers import Linear
from efficientllm.ops.embedding_lookup import look_up
from efficientllm.weights import parameter

FREQUENCIES = 128  # half the features of a noise level


def level_waves(levels_B: jax.Array, denominator: int = FREQUENCIES) -> jax.Array:
    """Computes the features of noise levels 0..1000: `[cos | sin](level * 10000^(-i / denominator))`, `[B, 256]`.

    The denominator is 128 in DiT, SD3 and Wan, and 127 in diffusers' DiT. Angles reach 1000, where one rounding of a
    frequency moves a cosine by 3e-5: frequencies are rounded as in the references, exponent by exponent in float32.
    """
    exponents = np.float32(-math.log(10_000)) * np.arange(FREQUENCIES, dtype=np.float32) / np.float32(denominator)
    angle = levels_B[:, None].astype(jnp.float32) * np.exp(exponents)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


class VectorEmbedding(nn.Module):
    """Embedding of vectors, `[B, E] -> float32 [B, dim]`: Linear, SiLU, Linear."""

    dim: int
    precision: str

    @nn.compact
    def __call__(self, vectors_BE: jax.Array) -> jax.Array:
        def linear(name, axes):
            init = nn.initializers.normal(0.02)
            return Linear(self.dim, axes, self.precision, True, jnp.float32, init, name=name)

        hidden_BD = linear("0", ("embed", "mlp"))(vectors_BE)
        return linear("2", ("mlp", "embed"))(jax.nn.silu(hidden_BD))


class TimeEmbedding(nn.Module):
    """Embedding of noise levels, `[B] -> float32 [B, dim]`: the `VectorEmbedding` of their `level_waves`."""

    dim: int
    precision: str
    denominator: int = FREQUENCIES

    @nn.compact
    def __call__(self, levels_B: jax.Array) -> jax.Array:
        embedding = VectorEmbedding(self.dim, self.precision)
        nn.share_scope(self, embedding)
        return embedding(level_waves(levels_B, self.denominator))


class TextEmbedding(nn.Module):
    """Map of the states of a text's tokens to the model's width, `[B, S, E] -> [B, S, dim]`: Linear, tanh GELU, Linear.

    As in Wan and PixArt. Tokens of padding, which are zeros, become a constant vector.
    """

    dim: int
    precision: str

    @nn.compact
    def __call__(self, text_BSE: jax.Array) -> jax.Array:
        def linear(name, axes):
            return Linear(self.dim, axes, self.precision, True, None, nn.initializers.normal(0.02), name=name)

        hidden_BSD = jax.nn.gelu(linear("0", ("embed", "mlp"))(text_BSE), approximate=True)
        return linear("2", ("mlp", "embed"))(hidden_BSD)


def embed_labels(module: nn.Module, labels_B: jax.Array, classes: int, dim: int) -> jax.Array:
    """Looks up the rows of `labels` in the parameter `label_table` of `module`, float32 `[B, dim]`.

    The table has `classes + 1` rows; the last stands for no label. Call it inside the compact method of `module`.
    """
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    table = parameter(module, "label_table", init, (classes + 1, dim))
    return look_up(table, labels_B[:, None], jnp.float32)[:, 0]
