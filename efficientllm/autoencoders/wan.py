"""Autoencoder of clips: the frozen AutoencoderKLWan of a diffusers folder, Wan 2.1's."""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import sharding
from efficientllm.autoencoders import frame_chunks, tiles, wan_folder
from efficientllm.autoencoders.base import LOG_VARIANCE, draw
from efficientllm.autoencoders.causal_convolutions import PAST
from efficientllm.autoencoders.folder import FolderAutoencoder, Leaves
from efficientllm.autoencoders.wan_network import Decoder, Encoder, WanShape, abstract_clips
from efficientllm.registry import register
from efficientllm.typing import Params, PathLike


@register("autoencoder", "wan", example="wan(path='vae')")
@dataclasses.dataclass(frozen=True)
class Wan(FolderAutoencoder):
    """AutoencoderKLWan (Wan 2.1, arXiv:2503.20314) of a diffusers folder: 1 + 4 k frames, 1 + k latent frames.

    Clips are `[B, F, H, W, 3]`, latents `[B, f, h, w, C]`; a picture `[B, H, W, 3]` is a clip of one frame, and so is
    its latent. Latents are `(z - latents_mean) / latents_std` of each channel.

    Clips are computed in chunks of latent frames with the last two frames of what precedes each convolution carried
    from chunk to chunk. The numbers are those of the whole but for rounding, and the peak memory that of one chunk,
    the clip and its latents: a tensor of 96 channels of 81 frames of 480 x 832 pixels has 12.4 GB, of 4 frames 0.6 GB.

    In tiles (`tile` above 0), the levels before (encode) or after (decode) the middle exist for one tile at a time. As
    no norm looks at other pixels, tiles are exact. What the middle needs of all frames is at the size of latents.

    Attributes:
      path, precision: those of FolderAutoencoder.
      chunk: latent frames computed at a time; 0 computes the whole clip at once.
      tile: side of a tile, in latent pixels; 0 computes whole frames.
    """

    chunk: int = 1
    tile: int = 0

    class_name = "AutoencoderKLWan"

    def describe(self, config: dict[str, typing.Any], where: PathLike) -> wan_folder.Description:
        return wan_folder.describe_config(config, where, self.precision)

    def leaves_of(self, params: Params) -> Leaves:
        return wan_folder.leaves_of(params, self.shape.layers)

    @property
    def frame_factor(self) -> int:
        return self.shape.frame_factor

    def abstract_params(self) -> Params:
        return abstract_params(self.shape)

    def fingerprint(self) -> str:
        """The digest of the folder, and the fields that change how a result is rounded."""
        return f"wan {self.digest()} chunk={self.chunk} tile={self.tile}"

    def posterior_with(self, params: Params, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
        if images_BhwC.ndim == 4:
            return jax.tree.map(lambda x: x[:, 0], self.posterior_with(params, images_BhwC[:, None]))
        shape, params = self.shape, params["encoder"]
        clips_BFhwC = sharding.constrain(images_BhwC, "batch", None, None, None, None)
        tiling = tiles.Tiling(self.tile, tiles.encoder_halo(shape.factor, shape.layers), shape.factor, 1, 0)
        encoder, rates = Encoder(shape), (shape.frame_factor, 1)
        if self.tile and not tiling.is_whole(clips_BFhwC):
            x_BFhwC = self._run_tiled(encoder, params, clips_BFhwC, rates, "down", tiling)
            moments = self._run(encoder, params, x_BFhwC, (1, 1), "finish")
        else:
            moments = self._run(encoder, params, clips_BFhwC, rates)
        mean_BFhwC, logvar_BFhwC = jnp.split(moments, 2, -1)
        return mean_BFhwC, jnp.clip(logvar_BFhwC, *LOG_VARIANCE)

    def sample(self, mean_BhwC: jax.Array, logvar_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return (draw(mean_BhwC, logvar_BhwC, key) - self._means) / self._stds

    def decode_with(self, params: Params, latents_BhwC: jax.Array) -> jax.Array:
        """Decodes scaled latents to clips in [-1, 1]."""
        if latents_BhwC.ndim == 4:
            return self.decode_with(params, latents_BhwC[:, None])[:, 0]
        shape, params = self.shape, params["decoder"]
        latents_BFhwC = sharding.constrain(latents_BhwC, "batch", None, None, None, None)
        z_BFhwC = latents_BFhwC.astype(jnp.float32) * self._stds + self._means
        tiling = tiles.Tiling(self.tile, tiles.decoder_halo(shape.factor, shape.layers), 1, shape.factor, 0)
        decoder, rates = Decoder(shape), (1, shape.frame_factor)
        if not self.tile or tiling.is_whole(z_BFhwC):
            return self._run(decoder, params, z_BFhwC, rates)
        x_BFhwC = self._run(decoder, params, z_BFhwC, (1, 1), "start")
        return self._run_tiled(decoder, params, x_BFhwC, rates, "up", tiling)

    @property
    def _means(self):
        return np.asarray(self._described.means, np.float32)

    @property
    def _stds(self):
        return np.asarray(self._described.stds, np.float32)

    def _run(self, module, params, x_BFhwC, rates, method=None):
        """One half, or a method of it, whole or in chunks; `rates` are frames in and out per latent frame."""
        if not self.chunk:
            return module.apply({"params": params}, x_BFhwC, method=method)

        def apply(x_BFhwC, past):
            variables = {"params": params} if past is None else {"params": params, PAST: past}
            result, state = module.apply(variables, x_BFhwC, method=method, mutable=[PAST])
            return result, state[PAST]

        return frame_chunks.compute_in_chunks(apply, x_BFhwC, self.chunk, *rates)

    def _run_tiled(self, module, params, x_BFhwC, rates, method, tiling):
        """A method of one half, tile after tile, each in chunks."""

        def apply(window_BFhwC, tile, moments):
            return self._run(module, params, window_BFhwC, rates, method), {}

        return tiles.compute_tiled(apply, x_BFhwC, tiling)


def abstract_params(shape: WanShape) -> Params:
    """The parameters of an AutoencoderKLWan as `jax.ShapeDtypeStruct`."""
    key, (clips, latents) = jax.random.key(0), abstract_clips(shape)
    return {
        "encoder": nn.unbox(jax.eval_shape(Encoder(shape).init, key, clips))["params"],
        "decoder": nn.unbox(jax.eval_shape(Decoder(shape).init, key, latents))["params"],
    }
