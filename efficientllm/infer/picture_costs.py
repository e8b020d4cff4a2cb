"""Costs of sampling a picture by its shapes: FLOPs and bytes of a solver step and of decoding, and the memory."""

import dataclasses
import functools
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.cost import formulas, jaxpr_flops, live_bytes
from efficientllm.embeds.patches import Denoiser
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.image_samples import image_shape
from efficientllm.typing import Params, PyTree

FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class PictureCosts:
    """Costs of pictures of a sampler.

    boxed:    the model's abstract parameters, boxed with their logical axes.
    encoder:  the autoencoder whose latents are sampled, or None for pixels.
    """

    sampler: DiffusionSampler
    boxed: PyTree
    encoder: typing.Any = None

    @property
    def model(self) -> Denoiser:
        return self.sampler.model

    @property
    def tokens(self) -> int:
        """Patches of a picture."""
        return self.model.row_length(0)

    @functools.cached_property
    def step_flops(self) -> float:
        """FLOPs of a solver step of one picture, by closed formula: a call of the model, or two with guidance."""
        call_flops = formulas.forward_flops(self.model, self.boxed, self.tokens)
        return self.sampler.rows_per_image * call_flops - self.request_flops

    @functools.cached_property
    def request_flops(self) -> float:
        """FLOPs of what the steps of one picture share: the keys and values of its text, and of its negative's."""
        return self.sampler.rows_per_image * formulas.request_flops(self.model, self.boxed, self.tokens)

    @functools.cached_property
    def decode_flops(self) -> float:
        """FLOPs of decoding one latent, of the products in the decoder's jaxpr; 0 for pixels."""
        if self.encoder is None:
            return 0.0
        return jaxpr_flops.count_program_flops(self._decode_of_one.jaxpr)

    @functools.cached_property
    def _decode_of_one(self):
        """The traced program that decodes one latent."""
        return jax.jit(self.encoder.decode_with).trace(self.encoder.abstract_params(), self.latents(1))

    @property
    def image_flops(self) -> float:
        """FLOPs of a picture, from noise to pixels."""
        return self.request_flops + self.sampler.steps * self.step_flops + self.decode_flops

    def latents(self, rows: int) -> jax.ShapeDtypeStruct:
        """What is sampled, abstract."""
        return jax.ShapeDtypeStruct((rows, *image_shape(self.model)), jnp.float32)

    def picture_bytes(self, rows: int) -> int:
        """Bytes of the noisy pictures of a step, read and written, and of the model's inputs and predictions."""
        calls = rows * self.sampler.rows_per_image
        values = 2 * rows * self.model.channels + calls * (self.model.channels + self.model.out_channels)
        return FLOAT32 * math.prod(self.model.size) * values

    def step_bytes(self, params: Params, rows: int) -> float:
        """Bytes that a step of `rows` pictures must move at least: weights and keys and values of texts read once,
        pictures read and written.

        `params` are the stored parameters, quantized or not, which may be abstract.
        """
        tokens = rows * self.sampler.rows_per_image * self.tokens
        weights = formulas.read_weight_bytes(self.model, self.boxed, params, tokens, in_steps=True)
        return weights + self.request_bytes(rows) + self.picture_bytes(rows)

    def request_bytes(self, rows: int) -> int:
        """Bytes of what the steps of `rows` pictures share: the keys and values of their texts."""
        states = self.sampler.abstract_request(nn.unbox(self.boxed), rows).states
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))

    def live_bytes(self, rows: int) -> int:
        """Bytes of the arrays beside the weights that exist at once in a step, from its jaxpr (`cost.live_bytes`)."""
        step = self.sampler.trace(nn.unbox(self.boxed), rows, image_shape(self.model), count=1)
        latents = 2 * FLOAT32 * self.latents(rows).size
        return live_bytes.count_live_bytes(step.jaxpr) + latents + self.request_bytes(rows)

    def decode_live_bytes(self, rows: int) -> int:
        """Bytes of the arrays beside the weights that exist at once while `rows` latents are decoded; 0 for pixels.

        As many for each latent as for one.
        """
        if self.encoder is None:
            return 0
        return rows * (live_bytes.count_live_bytes(self._decode_of_one.jaxpr) + FLOAT32 * self.latents(1).size)
