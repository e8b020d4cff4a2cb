"""AutoencoderKLWan (Wan 2.1, arXiv:2503.20314, section 4.1) as diffusers computes it.

Residual blocks of channel norm, SiLU and convolutions that reach two frames back; a middle of two of them with one
attention over the pixels of each frame between. The encoder halves the sides by convolutions of stride 2, the decoder
doubles them by repeating pixels; some levels halve or double the frames too, but for the first. What comes before the
middle (encoder) or after it (decoder) can be computed in tiles, and everything in chunks of frames.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.autoencoders.causal_convolutions import CausalConv, ChannelNorm, DoubleFrames, FrameConv, HalveFrames
from efficientllm.autoencoders.convolutions import pointwise
from efficientllm.autoencoders.kl_network import attend
from efficientllm.weights import activation_dtype


@dataclasses.dataclass(frozen=True)
class WanShape:
    """Hyperparameters of an AutoencoderKLWan.

    Args:
      widths: of the encoder's levels, from clips to latents; each level but the last halves the sides.
      decoder_widths: of the decoder's levels, likewise from clips to latents.
      layers: residual blocks of a level of the encoder; the decoder has one more.
      halves_frames: of each level but the last, whether it halves the frames as well.
    """

    widths: tuple[int, ...] = (96, 192, 384, 384)
    decoder_widths: tuple[int, ...] = (96, 192, 384, 384)
    layers: int = 2
    halves_frames: tuple[bool, ...] = (False, True, True)
    latent_channels: int = 16
    image_channels: int = 3
    output_channels: int = 3
    precision: str = "float32"

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def frame_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.halves_frames)


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`; a product adapts x where widths differ."""

    features: int
    precision: str

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        h_BFhwC = x_BFhwC
        for i in (1, 2):
            h_BFhwC = nn.silu(ChannelNorm(name=f"norm{i}")(h_BFhwC))
            h_BFhwC = CausalConv(self.features, self.precision, name=f"conv{i}")(h_BFhwC)
        if x_BFhwC.shape[-1] != self.features:
            x_BFhwC = pointwise(self.features, self.precision, name="shortcut")(x_BFhwC)
        return x_BFhwC + h_BFhwC


class FrameAttention(nn.Module):
    """Attention of one head over the pixels of each frame, with a norm before and the input added after."""

    precision: str

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        B, F, h, w, C = x_BFhwC.shape
        x_NTC = ChannelNorm(name="norm")(x_BFhwC).reshape(B * F, h * w, C)
        q, k, v = jnp.split(pointwise(3 * C, self.precision, name="qkv")(x_NTC), 3, -1)
        y_NTC = pointwise(C, self.precision, name="o")(attend(q, k, v))
        return x_BFhwC + y_NTC.reshape(x_BFhwC.shape)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    features: int
    precision: str

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        x_BFhwC = ResidualBlock(self.features, self.precision, name="resnet_0")(x_BFhwC)
        x_BFhwC = FrameAttention(self.precision, name="attention")(x_BFhwC)
        return ResidualBlock(self.features, self.precision, name="resnet_1")(x_BFhwC)


class Level(nn.Module):
    """Residual blocks of one width, and `resample`: "down", "up" (which halves the channels), or "" for the last.

    With `frames` the resampling halves or doubles frames as well.
    """

    features: int
    layers: int
    precision: str
    resample: str
    frames: bool

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x_BFhwC = ResidualBlock(self.features, self.precision, name=f"resnet_{i}")(x_BFhwC)
        if self.resample == "up":
            if self.frames:
                x_BFhwC = DoubleFrames(2 * self.features, self.precision, side=1, name="time")(x_BFhwC)
            x_BFhwC = FrameConv(self.features // 2, self.precision, "up", name="resample")(x_BFhwC)
        if self.resample == "down":
            x_BFhwC = FrameConv(self.features, self.precision, "down", name="resample")(x_BFhwC)
            if self.frames:
                x_BFhwC = HalveFrames(self.features, self.precision, side=1, name="time")(x_BFhwC)
        return x_BFhwC


class Encoder(nn.Module):
    """Encoder: clips `[B, F, H, W, 3]` to the mean and the log variance of latents `[B, f, h, w, 2 C]`, float32."""

    shape: WanShape

    def setup(self) -> None:
        shape = self.shape
        self.conv_in = CausalConv(shape.widths[0], shape.precision)
        frames = (*shape.halves_frames, False)
        self.level = [_level(shape, shape.widths, i, shape.layers, "down", frames[i]) for i in range(len(frames))]
        self.mid = Middle(shape.widths[-1], shape.precision)
        self.norm_out = ChannelNorm()
        self.conv_out = CausalConv(2 * shape.latent_channels, shape.precision)
        self.quant = pointwise(2 * shape.latent_channels, shape.precision)

    def __call__(self, clips_BFhwC: jax.Array) -> jax.Array:
        return self.finish(self.down(clips_BFhwC))

    def down(self, clips_BFhwC: jax.Array) -> jax.Array:
        """The levels, which can be computed in tiles: `[B, F, H, W, 3]` to `[B, f, h, w, widths[-1]]`."""
        x_BFhwC = self.conv_in(clips_BFhwC.astype(activation_dtype(self.shape.precision)))
        for level in self.level:
            x_BFhwC = level(x_BFhwC)
        return x_BFhwC

    def finish(self, x_BFhwC: jax.Array) -> jax.Array:
        """The middle and what follows it, at the size of latents."""
        x_BFhwC = self.conv_out(nn.silu(self.norm_out(self.mid(x_BFhwC))))
        return self.quant(x_BFhwC).astype(jnp.float32)


class Decoder(nn.Module):
    """Decoder: latents `[B, f, h, w, C]` to clips `[B, F, H, W, 3]` in [-1, 1], float32."""

    shape: WanShape

    def setup(self) -> None:
        shape = self.shape
        self.quant = pointwise(shape.latent_channels, shape.precision)
        self.conv_in = CausalConv(shape.decoder_widths[-1], shape.precision)
        self.mid = Middle(shape.decoder_widths[-1], shape.precision)
        frames, last = (False, *shape.halves_frames), len(shape.halves_frames)
        self.level = [
            _level(shape, shape.decoder_widths, last - i, shape.layers + 1, "up", frames[last - i])
            for i in range(last + 1)
        ]
        self.norm_out = ChannelNorm()
        self.conv_out = CausalConv(shape.output_channels, shape.precision)

    def __call__(self, latents_BFhwC: jax.Array) -> jax.Array:
        return self.up(self.start(latents_BFhwC))

    def start(self, latents_BFhwC: jax.Array) -> jax.Array:
        """What precedes the levels, at the size of latents."""
        x_BFhwC = self.quant(latents_BFhwC.astype(activation_dtype(self.shape.precision)))
        return self.mid(self.conv_in(x_BFhwC))

    def up(self, x_BFhwC: jax.Array) -> jax.Array:
        """The levels, which can be computed in tiles: `[B, f, h, w, widths[-1]]` to `[B, F, H, W, 3]`."""
        for level in self.level:
            x_BFhwC = level(x_BFhwC)
        clips_BFhwC = self.conv_out(nn.silu(self.norm_out(x_BFhwC))).astype(jnp.float32)
        return jnp.clip(clips_BFhwC, -1, 1)


def _level(shape, widths, index, layers, resample, frames):
    """Level `index`, counted from clips. The last of each half keeps the size."""
    is_last = index == (len(widths) - 1 if resample == "down" else 0)
    return Level(widths[index], layers, shape.precision, "" if is_last else resample, frames and not is_last)


def abstract_clips(shape: WanShape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The smallest `(clips, latents)` that every layer sees: two latent frames of one pixel."""
    clips = (1, 1 + shape.frame_factor, shape.factor, shape.factor, shape.image_channels)
    return tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in (clips, (1, 2, 1, 1, shape.latent_channels)))
