"""Convolutions over the frames of clips that reach back only, with what they need of the frames before.

A clip can be computed in chunks of frames. A convolution of n frames stores the last n - 1 frames of its input in the
collection "past", where that is mutable, and has them in front of the next chunk. Without the collection a chunk is the
start of its clip.

A convolution over frames, rows and columns is one over rows and columns of three frames' channels: on CPUs XLA's
convolution over three axes is 2.3 times as slow (96 channels of 60 x 104 pixels), and takes as long to compile.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.autoencoders.convolutions import Conv, convolve, double
from efficientllm.weights import Precision

PAST = "past"


_init_kernel = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(-3, -2))


class CausalConv(nn.Module):
    """Convolution with a bias of a clip `[B, F, h, w, C]`, as many frames out; zeros stand before the first.

    Attributes:
      features: channels of the output.
      precision: a `Precision`, or the spec of one.
      side: rows and columns of the kernel, 3 or 1.
    """

    features: int
    precision: str | Precision
    side: int = 3

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        return self._convolve(self._with_past(x_BFhwC, _zeros(x_BFhwC, 2)))

    def _convolve(self, x_BFhwC, stride=1):
        """Convolves over all frames, without any before the first."""
        B, F, h, w, C = x_BFhwC.shape
        kernel = self.param("kernel", _init_kernel, (self.side, self.side, 3, C, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        frames = (F - 3) // stride + 1
        taps = [x_BFhwC[:, tap : tap + (frames - 1) * stride + 1 : stride] for tap in range(3)]
        x_NhwC = jnp.concatenate(taps, -1).reshape(B * frames, h, w, 3 * C)
        kernel = kernel.reshape(self.side, self.side, 3 * C, self.features)
        y_NhwC = convolve(x_NhwC, kernel, self.precision, padding=((self.side // 2,) * 2,) * 2)
        return y_NhwC.reshape(B, frames, h, w, -1) + bias.astype(y_NhwC.dtype)

    def _with_past(self, x_BFhwC, default):
        """The frames before this chunk, `default` at the start of a clip, and those of the chunk; stores its last."""
        past = self.get_variable(PAST, "frames") if self._has_past else default
        x_BFhwC = jnp.concatenate([past, x_BFhwC], 1)
        self._store(x_BFhwC[:, -past.shape[1] :])
        return x_BFhwC

    @property
    def _has_past(self):
        return self.has_variable(PAST, "frames")

    def _store(self, x_BFhwC):
        if self.is_mutable_collection(PAST):
            self.put_variable(PAST, "frames", x_BFhwC)


class DoubleFrames(CausalConv):
    """Doubles the frames of a clip, but for its first: a convolution makes the channels of two out of each.

    The first frame passes, and is not seen by those that follow.
    """

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        first, x_BFhwC = (x_BFhwC[:, :0], x_BFhwC) if self._has_past else (x_BFhwC[:, :1], x_BFhwC[:, 1:])
        if not x_BFhwC.shape[1]:
            self._store(_zeros(first, 2))
            return first
        B, F, h, w, C = x_BFhwC.shape
        y_BFhwC = self._convolve(self._with_past(x_BFhwC, _zeros(x_BFhwC, 2)))
        y_BFhwC = jnp.moveaxis(y_BFhwC.reshape(B, F, h, w, 2, C), 4, 2).reshape(B, 2 * F, h, w, C)
        return jnp.concatenate([first, y_BFhwC], 1)


class HalveFrames(CausalConv):
    """Halves the frames of a clip, but for its first, which passes: a convolution of stride 2 over all frames."""

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        first, x_BFhwC = (x_BFhwC[:, :0], x_BFhwC) if self._has_past else (x_BFhwC[:, :1], x_BFhwC[:, 1:])
        if not x_BFhwC.shape[1]:
            self._store(first)
            return first
        y_BFhwC = self._convolve(self._with_past(x_BFhwC, first), stride=2)
        return jnp.concatenate([first, y_BFhwC], 1)


class FrameConv(nn.Module):
    """Resampling of the sides of each frame by a convolution of 3 x 3 pixels: "up" doubles them, "down" halves them."""

    features: int
    precision: str | Precision
    resample: str

    @nn.compact
    def __call__(self, x_BFhwC: jax.Array) -> jax.Array:
        B, F, *_ = x_BFhwC.shape
        x_NhwC = x_BFhwC.reshape(B * F, *x_BFhwC.shape[2:])
        conv = Conv(self.features, self.precision, stride=1 if self.resample == "up" else 2, name="conv")
        y_NhwC = conv(double(x_NhwC) if self.resample == "up" else x_NhwC)
        return y_NhwC.reshape(B, F, *y_NhwC.shape[1:])


class ChannelNorm(nn.Module):
    """`x / max(|x|, 1e-12) * sqrt(C) * scale`, |x| the Euclidean norm over the C channels of a pixel, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(x32 * x32, -1, keepdims=True))
        normed = (x32 / jnp.maximum(norm, 1e-12)).astype(x.dtype)
        return normed * (x.shape[-1] ** 0.5 * scale).astype(x.dtype)


def _zeros(x_BFhwC, frames):
    return jnp.zeros((x_BFhwC.shape[0], frames, *x_BFhwC.shape[2:]), x_BFhwC.dtype)
