"""Autoencoder, the base class of frozen maps between images and latents."""

import functools

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.typing import Params

Shape = tuple[int, ...]
LOG_VARIANCE = (-30.0, 20.0)  # bounds of a posterior's log variance


class Autoencoder:
    """Frozen map between images `[B, H, W, 3]` in [-1, 1] and scaled latents `[B, h, w, C]`, both float32.

    Of clips, `[B, F, H, W, 3]` and `[B, f, h, w, C]`: such an autoencoder has a `frame_factor`.

    Subclasses are frozen dataclasses registered as ("autoencoder", name). They define `factor`, `channels`,
    `abstract_params`, `load_params`, `fingerprint`, and `posterior_with`, `sample` and `decode_with`, which are pure.

    precision:  of products and activations.
    """

    precision = "float32"

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        raise NotImplementedError(f"{type(self).__name__} defines no factor")

    @property
    def frame_factor(self) -> int | None:
        """Frames per latent frame, after the first, of an autoencoder of clips; None for one of pictures alone."""
        return None

    @property
    def channels(self) -> int | None:
        """C; None where latents have the channels of the images."""
        raise NotImplementedError(f"{type(self).__name__} defines no channels")

    @property
    def image_channels(self) -> int | None:
        """Channels of the images; None takes any."""
        return None

    def abstract_params(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`; no weights are read."""
        raise NotImplementedError(f"{type(self).__name__} defines no abstract_params()")

    def check_files(self) -> None:
        """Raises UserError for files that hold other tensors than `abstract_params`."""

    def load_params(self) -> Params:
        """Reads the parameters, replicated over the mesh in scope."""
        raise NotImplementedError(f"{type(self).__name__} defines no load_params()")

    def posterior_with(self, params: Params, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes images to the mean and the log variance of the latents' posterior, neither of them scaled."""
        raise NotImplementedError(f"{type(self).__name__} defines no posterior_with(params, images)")

    def sample(self, mean_BhwC: jax.Array, logvar_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Draws scaled latents from a posterior; without a key, scales its mean."""
        raise NotImplementedError(f"{type(self).__name__} defines no sample(mean, logvar, key)")

    def decode_with(self, params: Params, latents_BhwC: jax.Array) -> jax.Array:
        """Decodes scaled latents to images, which may leave [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode_with(params, latents)")

    def fingerprint(self) -> str:
        """A text that changes when the posterior of an image does: a key of cached latents."""
        raise NotImplementedError(f"{type(self).__name__} defines no fingerprint()")

    def encode_with(self, params: Params, images_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Encodes images to scaled latents: a sample of the posterior, or its mean without a key."""
        return self.sample(*self.posterior_with(params, images_BhwC), key)

    @functools.cached_property
    def _params_of_mesh(self):
        return {}

    @property
    def params(self) -> Params:
        """The parameters on the mesh in scope, read at the first use there."""
        mesh = jax.sharding.get_mesh()
        if mesh not in self._params_of_mesh:
            self._params_of_mesh.clear()  # one copy is enough
            self._params_of_mesh[mesh] = self.load_params()
        return self._params_of_mesh[mesh]

    @functools.cached_property
    def _posterior(self):
        return jax.jit(self.posterior_with)

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.encode_with)

    @functools.cached_property
    def _decode(self):
        return jax.jit(self.decode_with)

    def posterior(self, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes as `posterior_with`, compiled, with `params`. Raises UserError as `latent_shape` does."""
        self.latent_shape(images_BhwC.shape[1:])
        return self._posterior(self.params, images_BhwC)

    def encode(self, images_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Encodes as `encode_with`, compiled, with `params`. Raises UserError as `latent_shape` does."""
        self.latent_shape(images_BhwC.shape[1:])
        return self._encode(self.params, images_BhwC, key)

    def decode(self, latents_BhwC: jax.Array, params: Params | None = None) -> jax.Array:
        """Decodes as `decode_with`, compiled, with `params`, by default those of the mesh in scope.

        Raises UserError for latents of other channels.
        """
        self.check_channels(latents_BhwC.shape[-1])
        return self._decode(self.params if params is None else params, latents_BhwC)

    def latent_shape(self, image_shape: Shape) -> Shape:
        """The shape `(h, w, C)` of the latent of an image `(H, W, channels)`; of a clip `(F, H, W, channels)` as well.

        Raises UserError for sides that `factor` does not divide, for frames that are not 1 + a multiple of
        `frame_factor`, for clips without one, and for other channels than `image_channels`.
        """
        *frames, height, width, channels = image_shape
        if height % self.factor or width % self.factor:
            raise UserError(
                f"images of {height} x {width} pixels: the autoencoder needs sides that are multiples of "
                f"{self.factor}; crop or resize them to {self._nearest(height)} x {self._nearest(width)}"
            )
        if self.image_channels not in (None, channels):
            raise UserError(f"images of {channels} channels: the autoencoder takes {self.image_channels}")
        frames = [self._latent_frames(count) for count in frames]
        return (
            *frames,
            height // self.factor,
            width // self.factor,
            channels if self.channels is None else self.channels,
        )

    def _latent_frames(self, frames):
        factor = self.frame_factor
        if factor is None:
            raise UserError(
                f"clips of {frames} frames: the autoencoder takes pictures; take one of clips, such as wan(path=...)"
            )
        if frames < 1 or (frames - 1) % factor:
            lower = max(1, (frames - 1) // factor * factor + 1)
            raise UserError(
                f"clips of {frames} frames: the autoencoder needs 1 more than a multiple of {factor}; "
                f"take {lower} or {lower + factor}"
            )
        return 1 + (frames - 1) // factor

    def _nearest(self, side):
        return max(self.factor, side // self.factor * self.factor)

    def check_channels(self, channels: int) -> None:
        """Raises UserError unless latents have `channels`, those of a model."""
        if self.channels not in (None, channels):
            raise UserError(
                f"latents of {channels} channels: the autoencoder has {self.channels}; "
                f"let the model have {self.channels} channels, or take another autoencoder"
            )


def draw(mean_BhwC: jax.Array, logvar_BhwC: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Draws from a normal distribution; without a key, returns its mean."""
    if key is None:
        return mean_BhwC
    return mean_BhwC + jnp.exp(0.5 * logvar_BhwC) * jax.random.normal(key, mean_BhwC.shape)
