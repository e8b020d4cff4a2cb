"""KL autoencoder: the frozen AutoencoderKL of a diffusers folder."""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.autoencoders import kl_folder, tiles
from efficientllm.autoencoders.base import LOG_VARIANCE, draw
from efficientllm.autoencoders.folder import FolderAutoencoder, Leaves
from efficientllm.autoencoders.kl_network import Decoder, Encoder, KLShape
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.registry import register
from efficientllm.typing import Params, PathLike


@register("autoencoder", "kl", example="kl(path='vae')")
@dataclasses.dataclass(frozen=True)
class KL(FolderAutoencoder):
    """AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752) of a diffusers folder.

    Latents are `(z - shift_factor) * scaling_factor`.

    In tiles (`tile` above 0), the levels before (encode) or after (decode) the middle exist for one tile at a time;
    the middle itself, an attention over all pixels at the size of latents, is whole and exact. Convolutions are exact:
    a tile has a halo as wide as they reach (decode: 13 latent pixels in Stable Diffusion's, encode: 9). Group norms
    are exact where their moments are: after n `sweeps` those of the first n norms, of 25 in decode and 16 in encode,
    after which a result is the whole one's but for rounding. Before that it differs: for random weights of a quarter of
    the widths and tiles of 16 latent pixels of 64, decoded images by 1.2 % of their deviation (rms) without a sweep,
    where tiles show at their edges, 0.45 % with one, 0.32 % with two and 0.07 % with four; latents by 2.5 %, 2.4 %,
    4.9 % and 7.3 %.

    Attributes:
      path, precision: those of FolderAutoencoder.
      tile: side of a tile, in latent pixels; 0 computes the whole image at once.
      sweeps: passes over all tiles for the moments of group norms, each at the price of one decode.
    """

    tile: int = 0
    sweeps: int = 1

    class_name = "AutoencoderKL"

    def describe(self, config: dict[str, typing.Any], where: PathLike) -> kl_folder.Description:
        return kl_folder.describe_config(config, where, self.precision)

    def leaves_of(self, params: Params) -> Leaves:
        return kl_folder.leaves_of(params)

    def open_tensors(self) -> TensorReader:
        return kl_folder.open_tensors(self._folder)

    def abstract_params(self) -> Params:
        return abstract_params(self.shape)

    def fingerprint(self) -> str:
        """The digest of the folder, and the fields that change a result."""
        return f"kl {self.digest()} tile={self.tile} sweeps={self.sweeps if self.tile else 0}"

    def posterior_with(self, params: Params, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoder, shape = Encoder(self.shape), self.shape
        images_BhwC = sharding.constrain(images_BhwC, "batch", None, None, None)
        tiling = tiles.Tiling(self.tile, tiles.encoder_halo(shape.factor, shape.layers), shape.factor, 1, self.sweeps)
        x_BhwC = self._levels(encoder, params["encoder"], "down", images_BhwC, tiling)
        moments = encoder.apply({"params": params["encoder"]}, x_BhwC, method="finish")
        mean_BhwC, logvar_BhwC = jnp.split(moments, 2, -1)
        return mean_BhwC, jnp.clip(logvar_BhwC, *LOG_VARIANCE)

    def sample(self, mean_BhwC: jax.Array, logvar_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return (draw(mean_BhwC, logvar_BhwC, key) - self._described.shift) * self._described.scale

    def decode_with(self, params: Params, latents_BhwC: jax.Array) -> jax.Array:
        decoder, shape = Decoder(self.shape), self.shape
        latents_BhwC = sharding.constrain(latents_BhwC, "batch", None, None, None)
        z_BhwC = latents_BhwC.astype(jnp.float32) / self._described.scale + self._described.shift
        x_BhwC = decoder.apply({"params": params["decoder"]}, z_BhwC, method="start")
        tiling = tiles.Tiling(self.tile, tiles.decoder_halo(shape.factor, shape.layers), 1, shape.factor, self.sweeps)
        return self._levels(decoder, params["decoder"], "up", x_BhwC, tiling)

    def _levels(
        self, module: nn.Module, params: Params, method: str, x_BhwC: jax.Array, tiling: tiles.Tiling
    ) -> jax.Array:
        """The levels of one half, whole or in tiles."""
        if not self.tile or tiling.is_whole(x_BhwC):
            return module.apply({"params": params}, x_BhwC, method=method)

        def apply(window, tile, of_image):
            variables = {"params": params} | ({} if of_image is None else {"of_image": of_image})
            result, collected = module.apply(variables, window, tile, method=method, mutable=["moments"])
            return result, collected["moments"]

        return tiles.compute_tiled(apply, x_BhwC, tiling)


def abstract_params(shape: KLShape) -> Params:
    """The parameters of an AutoencoderKL as `jax.ShapeDtypeStruct`."""
    key = jax.random.key(0)
    images = jax.ShapeDtypeStruct((1, shape.factor, shape.factor, shape.image_channels), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 1, 1, shape.latent_channels), jnp.float32)
    return {
        "encoder": nn.unbox(jax.eval_shape(Encoder(shape).init, key, images))["params"],
        "decoder": nn.unbox(jax.eval_shape(Decoder(shape).init, key, latents))["params"],
    }
