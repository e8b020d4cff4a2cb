"""Identity autoencoder: the model learns pixels."""

import dataclasses

import jax
import jax.numpy as jnp

from efficientllm.autoencoders.base import Autoencoder
from efficientllm.registry import register
from efficientllm.typing import Params


@register("autoencoder", "pixels")
@dataclasses.dataclass(frozen=True)
class Pixels(Autoencoder):
    """Identity: latents are the images."""

    @property
    def factor(self) -> int:
        return 1

    @property
    def frame_factor(self) -> int:
        return 1

    @property
    def channels(self) -> None:
        return None

    def abstract_params(self) -> Params:
        return {}

    def load_params(self) -> Params:
        return {}

    def posterior_with(self, params: Params, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
        return images_BhwC, jnp.full_like(images_BhwC, -jnp.inf)

    def sample(self, mean_BhwC: jax.Array, logvar_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return mean_BhwC

    def fingerprint(self) -> str:
        return "pixels"

    def decode_with(self, params: Params, latents_BhwC: jax.Array) -> jax.Array:
        return latents_BhwC
