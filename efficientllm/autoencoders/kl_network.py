"""AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752, appendix G) as diffusers computes it.

Residual blocks of group norm, SiLU and 3 x 3 convolutions; a middle of two of them with one attention over all pixels
between; the encoder halves the sides by convolutions of stride 2, the decoder doubles them by repeating pixels. What
comes before the middle (encoder) or after it (decoder) can be computed in tiles.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.autoencoders.convolutions import Conv, GroupNorm, Tile, double, pointwise
from efficientllm.weights import activation_dtype

SCORES = 2**22  # scores of the attention that exist at a time, for one image


@dataclasses.dataclass(frozen=True)
class KLShape:
    """Hyperparameters of an AutoencoderKL.

    Args:
      widths: of the levels, from images to latents; each level but the last halves the sides.
      layers: residual blocks of a level of the encoder; the decoder has one more.
      groups: of the group norms.
      attention: whether the middle has an attention.
      quant: whether a product follows the encoder.
      post_quant: whether a product precedes the decoder.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    output_channels: int = 3
    groups: int = 32
    attention: bool = True
    quant: bool = True
    post_quant: bool = True
    precision: str = "float32"

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`; a product adapts x where widths differ."""

    features: int
    groups: int
    precision: str

    @nn.compact
    def __call__(self, x_BhwC: jax.Array, tile: Tile | None = None) -> jax.Array:
        h_BhwC = Conv(self.features, self.precision, name="conv1")(
            nn.silu(GroupNorm(self.groups, name="norm1")(x_BhwC, tile))
        )
        h_BhwC = Conv(self.features, self.precision, name="conv2")(
            nn.silu(GroupNorm(self.groups, name="norm2")(h_BhwC, tile))
        )
        if x_BhwC.shape[-1] != self.features:
            x_BhwC = pointwise(self.features, self.precision, name="shortcut")(x_BhwC)
        return x_BhwC + h_BhwC


class PixelAttention(nn.Module):
    """Attention of one head over all pixels, with a group norm before and the input added after."""

    groups: int
    precision: str

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        B, h, w, C = x_BhwC.shape
        x_BTC = GroupNorm(self.groups, name="norm")(x_BhwC).reshape(B, h * w, C)
        q, k, v = (pointwise(C, self.precision, name=name)(x_BTC) for name in "qkv")
        y_BTC = pointwise(C, self.precision, name="o")(attend(q, k, v))
        return x_BhwC + y_BTC.reshape(x_BhwC.shape)


def attend(q_BTC: jax.Array, k_BTC: jax.Array, v_BTC: jax.Array) -> jax.Array:
    """Attends with one head over all of T, with `SCORES` scores of an image at a time."""
    B, T, C = q_BTC.shape
    k_BT1C, v_BT1C = k_BTC[:, :, None], v_BTC[:, :, None]

    def attend_to_all(q_BtC):
        return jax.nn.dot_product_attention(q_BtC[:, :, None], k_BT1C, v_BT1C, implementation="xla")[:, :, 0]

    chunk = max(1, min(SCORES // T, T))
    whole = T - T % chunk
    if chunk == T:
        return attend_to_all(q_BTC)
    chunks = jnp.moveaxis(q_BTC[:, :whole].reshape(B, -1, chunk, C), 1, 0)
    y_BTC = jnp.moveaxis(jax.lax.map(attend_to_all, chunks), 0, 1).reshape(B, whole, C)
    return y_BTC if whole == T else jnp.concatenate([y_BTC, attend_to_all(q_BTC[:, whole:])], 1)


class Middle(nn.Module):
    """Residual block, attention (if the model has one), residual block."""

    features: int
    groups: int
    attention: bool
    precision: str

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        x_BhwC = ResidualBlock(self.features, self.groups, self.precision, name="resnet_0")(x_BhwC)
        if self.attention:
            x_BhwC = PixelAttention(self.groups, self.precision, name="attention")(x_BhwC)
        return ResidualBlock(self.features, self.groups, self.precision, name="resnet_1")(x_BhwC)


class Level(nn.Module):
    """Residual blocks of one width, and `resample`: "down", "up", or "" for the last level."""

    features: int
    layers: int
    groups: int
    precision: str
    resample: str

    @nn.compact
    def __call__(self, x_BhwC: jax.Array, tile: Tile | None = None) -> jax.Array:
        for i in range(self.layers):
            x_BhwC = ResidualBlock(self.features, self.groups, self.precision, name=f"resnet_{i}")(x_BhwC, tile)
        if self.resample == "down":
            x_BhwC = Conv(self.features, self.precision, stride=2, name="downsample")(x_BhwC)
        if self.resample == "up":
            x_BhwC = Conv(self.features, self.precision, name="upsample")(double(x_BhwC))
        return x_BhwC


class Encoder(nn.Module):
    """Encoder: images `[B, H, W, 3]` to the mean and the log variance of latents `[B, h, w, 2 C]`, float32."""

    shape: KLShape

    def setup(self) -> None:
        self.conv_in = Conv(self.shape.widths[0], self.shape.precision)
        self.level = [_level(self.shape, i, self.shape.layers, "down") for i in range(len(self.shape.widths))]
        self.mid = _middle(self.shape)
        self.norm_out = GroupNorm(self.shape.groups)
        self.conv_out = Conv(2 * self.shape.latent_channels, self.shape.precision)
        if self.shape.quant:
            self.quant = pointwise(2 * self.shape.latent_channels, self.shape.precision)

    def __call__(self, images_BhwC: jax.Array) -> jax.Array:
        return self.finish(self.down(images_BhwC))

    def down(self, images_BhwC: jax.Array, tile: Tile | None = None) -> jax.Array:
        """The levels, which can be computed in tiles: `[B, H, W, 3]` to `[B, h, w, widths[-1]]`."""
        x_BhwC = self.conv_in(images_BhwC.astype(activation_dtype(self.shape.precision)))
        for level in self.level:
            x_BhwC = level(x_BhwC, tile)
        return x_BhwC

    def finish(self, x_BhwC: jax.Array) -> jax.Array:
        """The middle and what follows it, at the size of latents."""
        x_BhwC = self.conv_out(nn.silu(self.norm_out(self.mid(x_BhwC))))
        x_BhwC = self.quant(x_BhwC) if self.shape.quant else x_BhwC
        return x_BhwC.astype(jnp.float32)


class Decoder(nn.Module):
    """Decoder: latents `[B, h, w, C]` to images `[B, H, W, 3]`, float32."""

    shape: KLShape

    def setup(self) -> None:
        if self.shape.post_quant:
            self.quant = pointwise(self.shape.latent_channels, self.shape.precision)
        self.conv_in = Conv(self.shape.widths[-1], self.shape.precision)
        self.mid = _middle(self.shape)
        last = len(self.shape.widths) - 1
        self.level = [_level(self.shape, last - i, self.shape.layers + 1, "up") for i in range(last + 1)]
        self.norm_out = GroupNorm(self.shape.groups)
        self.conv_out = Conv(self.shape.output_channels, self.shape.precision)

    def __call__(self, latents_BhwC: jax.Array) -> jax.Array:
        return self.up(self.start(latents_BhwC))

    def start(self, latents_BhwC: jax.Array) -> jax.Array:
        """What precedes the levels, at the size of latents."""
        x_BhwC = latents_BhwC.astype(activation_dtype(self.shape.precision))
        x_BhwC = self.quant(x_BhwC) if self.shape.post_quant else x_BhwC
        return self.mid(self.conv_in(x_BhwC))

    def up(self, x_BhwC: jax.Array, tile: Tile | None = None) -> jax.Array:
        """The levels, which can be computed in tiles: `[B, h, w, widths[-1]]` to `[B, H, W, 3]`."""
        for level in self.level:
            x_BhwC = level(x_BhwC, tile)
        return self.conv_out(nn.silu(self.norm_out(x_BhwC, tile))).astype(jnp.float32)


def _middle(shape):
    return Middle(shape.widths[-1], shape.groups, shape.attention, shape.precision)


def _level(shape, index, layers, resample):
    """Level `index`, counted from images. The last of each half keeps the size."""
    is_last = index == (len(shape.widths) - 1 if resample == "down" else 0)
    return Level(shape.widths[index], layers, shape.groups, shape.precision, "" if is_last else resample)
