"""Convolutions of images under a stated precision, resampling by two, and group norms.

Convolutions are the one product of the package outside `weights.matmul`: no form of a weight has one, so they can be
neither quantized nor adapted. Convolutions of one pixel are `layers.Linear`.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.layers import Linear, fan_in_normal
from efficientllm.weights import Precision

SAME = ((1, 1), (1, 1))
RIGHT = ((0, 1), (0, 1))  # as a downsampling AutoencoderKL pads


@flax.struct.dataclass
class Tile:
    """A tile of an image that is computed in tiles.

    Args:
      core: `(top, bottom, left, right)` within the tile, in latent pixels, of the pixels that are this tile's own.
      height: of the tile, in latent pixels.
    """

    core: jax.Array
    height: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class NormMoments:
    """Count, mean `[B, G]` and sum of squared deviations `[B, G]` of the groups of a norm."""

    count: jax.Array
    mean: jax.Array
    deviation: jax.Array


def merge_moments(a: NormMoments, b: NormMoments) -> NormMoments:
    """Merges the moments of two sets (Chan et al. 1979, Eq. 2.1); an empty set has a count of 0."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    difference = b.mean - a.mean
    return NormMoments(
        count,
        a.mean + difference * share,
        a.deviation + b.deviation + difference**2 * a.count * share,
    )


def convolve(
    x_BhwC: jax.Array, kernel_hwCF: jax.Array, precision: Precision | str, stride: int = 1, padding: tuple = SAME
) -> jax.Array:
    """Convolves `[B, H, W, in]` with `[h, w, in, out]`, accumulated in float32, in the dtype of `x_BhwC`."""
    product = Precision.of(precision).product
    y_BhwF = jax.lax.conv_general_dilated(
        x_BhwC.astype(product),
        kernel_hwCF.astype(product),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )
    return y_BhwF.astype(x_BhwC.dtype)


class Conv(nn.Module):
    """Convolution of 3 x 3 pixels with a bias; `stride` 2 pads right and bottom alone."""

    features: int
    precision: str | Precision
    stride: int = 1

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        kernel = self.param("kernel", fan_in_normal, (3, 3, x_BhwC.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padding = SAME if self.stride == 1 else RIGHT
        y_BhwC = convolve(x_BhwC, kernel, self.precision, self.stride, padding)
        return y_BhwC + bias.astype(y_BhwC.dtype)


def pointwise(features: int, precision: Precision | str, name: str | None = None) -> Linear:
    """A convolution of one pixel, with a bias."""
    return Linear(features, (None, None), precision, use_bias=True, name=name)


def double(x_BhwC: jax.Array) -> jax.Array:
    """Doubles both sides by repeating pixels: nearest-neighbour upsampling."""
    return jnp.repeat(jnp.repeat(x_BhwC, 2, 1), 2, 2)


class GroupNorm(nn.Module):
    """Group norm over `[H, W, C / groups]` with scale and bias (Wu & He 2018, arXiv:1803.08494), in float32.

    With a tile, and the collection "moments" mutable, the moments of the tile's core are stored there. Moments in the
    collection "of_image" replace those of `x`.
    """

    groups: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x_BhwC: jax.Array, tile: Tile | None = None) -> jax.Array:
        channels = x_BhwC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x_BhwGc = x_BhwC.astype(jnp.float32).reshape(*x_BhwC.shape[:-1], self.groups, -1)
        if tile is not None and self.is_mutable_collection("moments"):
            self.put_variable("moments", "core", _moments(x_BhwGc, _core_mask(x_BhwGc, tile)))
        is_given = self.has_variable("of_image", "core")
        moments = self.get_variable("of_image", "core") if is_given else _moments(x_BhwGc)
        variance_BG = moments.deviation / moments.count
        factor_BG = jax.lax.rsqrt(variance_BG + self.eps)
        normed = (x_BhwGc - moments.mean[:, None, None, :, None]) * factor_BG[:, None, None, :, None]
        return (normed.reshape(x_BhwC.shape) * scale + bias).astype(x_BhwC.dtype)


def _core_mask(x_BhwGc, tile):
    """float32 `[1, h, w, 1, 1]`, 1 in the core of the tile."""
    scale = x_BhwGc.shape[1] // tile.height
    top, bottom, left, right = (tile.core[i] * scale for i in range(4))
    rows, columns = (jnp.arange(size) for size in x_BhwGc.shape[1:3])
    mask_hw = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return mask_hw.astype(jnp.float32)[None, :, :, None, None]


def _moments(x_BhwGc, mask=1.0):
    total = functools.partial(jnp.sum, axis=(1, 2, 4), keepdims=True)
    count = x_BhwGc.shape[4] * jnp.sum(jnp.broadcast_to(mask, (1, *x_BhwGc.shape[1:3], 1, 1)))
    mean = total(x_BhwGc * mask) / jnp.maximum(count, 1)
    deviation = total((x_BhwGc - mean) ** 2 * mask)
    return NormMoments(count, mean[:, 0, 0, :, 0], deviation[:, 0, 0, :, 0])
