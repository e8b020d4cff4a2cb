"""Vision-language model: a language model some of whose tokens are features of images."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp

from efficientllm.embeds.tokens import LM, RowArray, Tokens
from efficientllm.embeds.vision_tower import Images, PatchArrays, VisionTower
from efficientllm.errors import FieldError
from efficientllm.model import Backbone, abstract_params
from efficientllm.ops.attention import Context
from efficientllm.registry import build, register
from efficientllm.typing import Batch, Config, Params
from efficientllm.weights import is_box, path_of

TOWER = "vision/"
# What a training batch calls the fields of its PatchArrays.
BATCH_KEYS = {field: f"patch_{field.partition('_')[0]}" for field in PatchArrays._fields}


class VisionLM(LM, kw_only=True):
    """A language model that reads images: `ctx.images` says which tokens are features, and of which patches.

    Without `ctx.images` it reads text alone. Rows have images of their own, so that sharding by rows needs no
    communication.

    Args:
      vision: the tower; its parameters are those under `vision/`.
      image_token: the id in whose place features stand.
      row_slots: the slots of patches of a training row; 0 trains on text alone.
    """

    vision: VisionTower
    image_token: int
    row_slots: int = 0

    reads: typing.ClassVar[str] = "text and images"
    new_parts: typing.ClassVar[tuple[str, ...]] = ("vision",)

    def place_images(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """Puts features of images into the slots of their tokens."""
        images = ctx.images
        if images is None:
            return x_BTD
        features_BMD = self.vision(images.patches) if images.features_BMD is None else images.features_BMD
        slots_BT1 = images.slots_BT[..., None]
        of_tokens_BTD = jnp.take_along_axis(features_BMD.astype(x_BTD.dtype), jnp.maximum(slots_BT1, 0), axis=1)
        return jnp.where(slots_BT1 >= 0, of_tokens_BTD, x_BTD)

    def encode(self, patches: PatchArrays) -> jax.Array:
        """Computes the features of images, float `[B, M, D]`; see `encode_images`."""
        return self.vision(patches)

    def image_arrays(self, length: int) -> dict[str, RowArray]:
        if not self.row_slots:
            return {}
        (patches,) = self.vision.example(length)
        of_tokens = {"slots": RowArray(jax.ShapeDtypeStruct((length,), jnp.int32), ("length",))}
        if self.axes > 1:
            coordinates = jax.ShapeDtypeStruct((length, self.axes), jnp.int32)
            of_tokens["coordinates"] = RowArray(coordinates, ("length", None))
        of_patches = {
            BATCH_KEYS[field]: jax.ShapeDtypeStruct((self.row_slots, *array.shape[2:]), array.dtype)
            for field, array in patches._asdict().items()
            if array is not None
        }
        return of_tokens | {key: RowArray(row, (None,) * row.ndim) for key, row in of_patches.items()}

    def context(self, batch: Batch) -> Context:
        ctx = super().context(batch)
        if not self.row_slots:
            return ctx
        patches = PatchArrays(**{field: batch.get(key) for field, key in BATCH_KEYS.items()})
        return ctx.replace(coordinates_BTA=batch.get("coordinates"), images=Images(batch["slots"], patches))

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
        return path.startswith(TOWER)

    def kernel_rows(self, path: str, length: int) -> int:
        """Counts the rows of a kernel for a row of `length` tokens; those of the tower are patches, in training."""
        if self.is_of_request(path):
            return self.vision.kernel_rows(path.removeprefix(TOWER), self.row_slots)
        return length

    def part_of(self, path: str) -> str:
        if path.startswith("vision/projector/"):
            return "projector"
        return "tower" if path.startswith("vision/") else "language model"

    def branches(self) -> dict[str, tuple[Backbone, int]]:
        return {TOWER: (self.vision, self.row_slots)} if self.row_slots else {}

    def has_input_gradient(self, path: str, trains: typing.Callable[[str], bool]) -> bool:
        """Whether a kernel's input has a gradient: that of the tower's has one where anything below it learns."""
        if not self.is_of_request(path):
            return True
        place = _place(path)
        below = [other for other in _tower_paths(self.vision) if _place(other) < place + (place == _BLOCKS)]
        return any(map(trains, below))

    def language_model(self) -> LM:
        """Returns the language model alone."""
        fields = (field.name for field in dataclasses.fields(LM) if field.name not in ("parent", "name"))
        return LM(**{name: getattr(self, name) for name in fields}, parent=None)


_BLOCKS = 1  # where blocks come in a tower; before them an embedding, then a norm and the maps of the projector


def _place(path):
    """Where a parameter of the tower comes in its forward pass; all blocks are one place, as a scan has them."""
    name = path.removeprefix(TOWER)
    if name.startswith("projector/"):
        return 3 + name.startswith("projector/2")
    return _BLOCKS if name.startswith("group") else 2 if name.startswith("norm") else 0


@functools.lru_cache
def _tower_paths(tower):
    boxed = abstract_params(tower)
    return tuple(TOWER + path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box))


def encode_images(lm: VisionLM, params: Params, patches: PatchArrays) -> jax.Array:
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
