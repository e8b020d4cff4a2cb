"""Vision-language model: a language model some of whose tokens are features of images."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from efficientllm.embeds.tokens import LM, Tokens
from efficientllm.embeds.vision_tower import Images, Patches, VisionTower
from efficientllm.errors import FieldError
from efficientllm.ops.attention import Context
from efficientllm.registry import build, register
from efficientllm.typing import Config, Params


class VisionLM(LM, kw_only=True):
    """A language model that reads images: `ctx.images` says which tokens are features, and of which patches.

    Without `ctx.images` it reads text alone. Rows have images of their own, so that sharding by rows needs no
    communication.

    Args:
      vision: the tower; its parameters are those under `vision/`.
      image_token: the id in whose place features stand.
    """

    vision: VisionTower
    image_token: int

    reads: typing.ClassVar[str] = "text and images"

    def place_images(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """Puts features of images into the slots of their tokens."""
        images = ctx.images
        if images is None:
            return x_BTD
        features_BMD = self.vision(images.patches) if images.features_BMD is None else images.features_BMD
        slots_BT1 = images.slots_BT[..., None]
        of_tokens_BTD = jnp.take_along_axis(features_BMD.astype(x_BTD.dtype), jnp.maximum(slots_BT1, 0), axis=1)
        return jnp.where(slots_BT1 >= 0, of_tokens_BTD, x_BTD)

    def encode(self, patches: Patches) -> jax.Array:
        """Computes the features of images, float `[B, M, D]`; see `encode_images`."""
        return self.vision(patches)

    def example(self, length: int) -> tuple:
        tokens_BT, ctx = super().example(length)
        (patches,) = self.vision.example(length)
        return tokens_BT, ctx.replace(images=Images(jnp.full_like(tokens_BT, -1), patches))

    @property
    def axes(self) -> int:
        """The axes of a token's coordinates: 3 for M-RoPE (time, row, column), else 1."""
        return build("position", self.position, parent=None).axes

    def layer_of(self, path: str) -> typing.Any:
        return None if self.is_of_request(path) else super().layer_of(path)

    def is_of_request(self, path: str) -> bool:
        """Whether a parameter is the tower's: it is read once for the images of a request, not for each token."""
        return path.startswith("vision/")

    def kernel_rows(self, path: str, length: int) -> int:
        """Counts the rows of a kernel for a row of `length` tokens of text; those of images are the tower's own."""
        return 0 if self.is_of_request(path) else length


def encode_images(lm: VisionLM, params: Params, patches: Patches) -> jax.Array:
    """Computes the features of images by the tower alone, `[B, M, D]`."""
    return lm.apply({"params": params}, patches, method="encode")


_EXAMPLE = "vit(num_layers=2, dim=64, num_heads=2, hidden=96, patch=4, projector_hidden=64)"


@register("embed", "vision", example=f"vision(tower={_EXAMPLE!r}, image_token=3)")
@dataclasses.dataclass(frozen=True)
class VisionEnds(Tokens):
    """Token ids and images in, logits out.

    Args:
      tower: a `tower` spec, of what makes vectors of images.
      image_token: the id in whose place those vectors stand.
    """

    tower: str
    image_token: int

    reads: typing.ClassVar[str] = VisionLM.reads

    def model(self, backbone: dict[str, typing.Any], model: Config, size: typing.Any, vocab_size: int | None) -> LM:
        """Builds the model of `config.model` from the fields of its `backbone`, for a tokenizer of `vocab_size`."""
        fields = self.fields(backbone, model, size, vocab_size)
        if fields["vocab_size"] is not None and self.image_token >= fields["vocab_size"]:
            raise FieldError(
                "embed", f"image_token = {self.image_token} is no token: the vocabulary has {fields['vocab_size']}"
            )
        tower = build("tower", self.tower, where="config.model.embed").tower(model, fields["dim"])
        return VisionLM(**fields, vision=tower, image_token=self.image_token)
