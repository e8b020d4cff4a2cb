"""Diffusion transformer (DiT: Peebles & Xie 2022, arXiv:2212.09748): patches of a noisy image in, a prediction out."""

import dataclasses
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.embeds.base import Ends
from efficientllm.embeds.condition import LEAVES, Condition
from efficientllm.embeds.conditioning import FREQUENCIES, TextEmbedding, TimeEmbedding, VectorEmbedding, embed_labels
from efficientllm.embeds.picture import ImageFormat
from efficientllm.embeds.request_states import request_states
from efficientllm.errors import UserError
from efficientllm.layers import Linear
from efficientllm.mixers.joint import TEXT
from efficientllm.model import Backbone, state_axes
from efficientllm.ops.attention import Context
from efficientllm.ops.patches import coordinates, patchify, tile_order, unpatchify
from efficientllm.registry import build, complete_spec, register
from efficientllm.typing import Config, Params, PyTree
from efficientllm.weights import Precision

xavier = nn.initializers.xavier_uniform()


class Denoiser(Backbone, kw_only=True):
    """A diffusion transformer that knows the noise level of an image, and its `Condition`.

    Args:
      patch: the side of a patch in pixels.
      size, channels: of the images, `(height, width)`; of videos `(frames, height, width)`. Parameters depend on the
        channels alone, and one model may be called with images of several sizes.
      any_size: the model is meant for images of other sizes too, and `size` is but the usual one.
      classes: the number of classes; label `classes` is none.
      learned_sigma: the output has as many channels again, for the variance.
      time_denominator: of the frequencies of noise levels (`conditioning.level_waves`).
      tile: tokens are in the order of squares of tile x tile; 1 is row by row.
      text_length, text_dim: tokens of a text, padding included, and the width of their states; 0 is no text. A model of
        texts reads no labels.
      pooled_dim: width of the vector of a text as a whole; 0 is none.
      text_embed: what maps the states to the model's width: `mlp` (Wan), or `linear` (SD3).
    """

    patch: int
    size: tuple[int, ...]
    channels: int
    classes: int
    learned_sigma: bool
    time_denominator: int
    tile: int
    text_length: int = 0
    text_dim: int = 0
    any_size: bool = False
    pooled_dim: int = 0
    text_embed: str = "mlp"

    order: typing.ClassVar[str] = "bidirectional"
    reads: typing.ClassVar[str] = "images"
    behind_blocks: typing.ClassVar[tuple[str, ...]] = ("final",)
    request_kernels: typing.ClassVar[tuple[str, ...]] = ("text/0", "text/2")

    @nn.compact
    def __call__(
        self, images_BhwC: jax.Array, levels_B: jax.Array, condition: Condition, states: PyTree | None = None
    ) -> tuple:
        """Returns the prediction, float32 `[B, h, w, out_channels]`, and aux stacked over groups.

        `levels_B` are noise levels of 0 to 1000. `condition` has the leaves of `condition_shapes`. `states` are its
        `request_states`; None computes them.
        """
        precision, B = Precision.of(self.precision), len(images_BhwC)
        grid = self.grid(images_BhwC.shape[1:-1])
        patches_BTc = patchify(images_BhwC.astype(precision.activation), self.patch)
        embedding = Linear(self.dim, (None, "embed"), self.precision, True, None, xavier, name="patch")
        position = build("position", self.position, name="position")
        order_T = tile_order(grid, self.tile)
        ctx = _context(grid, order_T)
        is_counted = position.axes == 1  # tokens by their number in the row, not by row and column
        position.check_coordinates(np.arange(len(order_T))[:, None] if is_counted else ctx.coordinates_BTA[0])
        where = ctx.positions_BT if is_counted else ctx.coordinates_BTA
        x_BTD = position.embed(embedding(patches_BTc[:, order_T]), where)
        condition_BD = TimeEmbedding(self.dim, self.precision, self.time_denominator, name="time")(levels_B)
        memo = self.init_memo(B, len(order_T), position)
        if self.text_length:
            ctx = ctx.replace(text_BSD=self._read_text(condition))
            memo |= {TEXT: ctx.text_BSD} if TEXT in memo else {}
        else:
            condition_BD += embed_labels(self, condition.labels_B, self.classes, self.dim)
        if self.pooled_dim:
            condition_BD += VectorEmbedding(self.dim, self.precision, name="pooled")(condition.pooled_BE)
        project = build("modulation", self.modulation, name="modulation").project
        ctx = ctx.replace(condition_BD=project(condition_BD))
        x_BTD, _, aux = self.apply_blocks((x_BTD, memo), ctx, states)
        features = self.patch**2 * self.out_channels
        y_BTc = Final(features, self.norm, self.modulation, self.precision, name="final")(x_BTD, condition_BD)
        return unpatchify(y_BTc[:, np.argsort(order_T)], grid, self.patch), aux

    def request_states(self, params: Params, condition: Condition) -> PyTree | None:
        """Computes what depends on `condition` and not on noise, for `__call__`: keys and values of its text, if any.

        None is a model without such layers.
        """
        if not self.text_length:
            return None
        text_BSD = self.apply({"params": params}, condition, method="_read_text")
        ctx = _context((1,) * len(self.size), np.arange(1)).replace(text_BSD=text_BSD)
        return request_states(self, params, ctx)

    def request_axes(self, states: PyTree | None) -> PyTree | None:
        """Returns the logical axes of `request_states`."""
        return None if states is None else state_axes(self, states)

    @nn.compact
    def _read_text(self, condition):
        text_BSE = condition.text_BSE.astype(Precision.of(self.precision).activation)
        if self.text_embed == "linear":
            return Linear(self.dim, (None, "embed"), self.precision, True, None, xavier, name="text")(text_BSE)
        return TextEmbedding(self.dim, self.precision, name="text")(text_BSE)

    @property
    def out_channels(self) -> int:
        return self.channels * (1 + self.learned_sigma)

    @property
    def side(self) -> int:
        """The side of square pictures. Raises UserError for others."""
        if len(self.size) != 2 or self.size[0] != self.size[1]:
            raise UserError(f"config.model.embed: size = {self.size}: the pictures of this model must be square")
        return self.size[0]

    def patch_side(self) -> int:
        return self.patch

    def token_side(self) -> int:
        return self.patch * self.tile

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the rows and columns of tokens of images of a size; the frames of a video are before them."""
        *frames, h, w = size
        return *frames, h // self.patch, w // self.patch

    def condition_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the leaves of the condition that the model reads, by their names in batches, for one picture."""
        shapes: dict[str, tuple[int, ...]] = {"labels": ()}
        if self.text_length:
            shapes = {"text": (self.text_length, self.text_dim)}
        if self.pooled_dim:
            shapes["pooled"] = (self.pooled_dim,)
        return {name: jax.ShapeDtypeStruct(shape, LEAVES[name][1]) for name, shape in shapes.items()}

    def null_condition(self, rows: int) -> Condition:
        """Returns the condition of `rows` pictures that says nothing of them: no class, zeros for a text."""
        null = Condition.abstract(self.condition_shapes(), rows)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), null)
        return zeros if null.labels_B is None else zeros.replace(labels_B=jnp.full(rows, self.classes, jnp.int32))

    def row_length(self, length: int) -> int:
        return math.prod(self.grid(self.size))

    def example(self, length: int) -> tuple:
        return jnp.zeros((1, *self.size, self.channels)), jnp.zeros((1,)), self.null_condition(1)

    def has_input_gradient(self, path: str, trains: typing.Callable[[str], bool]) -> bool:
        text_kernels = ["text/kernel"] if self.text_embed == "linear" else ["text/0/kernel", "text/2/kernel"]
        if path in ("patch/kernel", "time/0/kernel", "pooled/0/kernel", *text_kernels[:1]):
            return False  # they multiply arrays of the batch
        if path in ("time/2/kernel", "pooled/2/kernel"):
            return trains(path.replace("2", "0"))
        if self.is_of_request(path):  # its input is the text's
            before = text_kernels[: text_kernels.index(path)] if path in text_kernels else text_kernels
            return any(map(trains, before))
        of_condition = [f"{name}/{i}/kernel" for name in ("time", "pooled") for i in (0, 2)] + ["label_table"]
        return "modulation/" not in path or any(map(trains, of_condition))

    def kernel_rows(self, path: str, length: int) -> int:
        if path.startswith("text/"):
            return self.text_length
        return 1 if path.startswith(("time/", "pooled/")) or "modulation/" in path else length


def _context(grid, order_T):
    """Makes the context of a grid of tokens in the order `order_T`; coordinates are constants of the host."""
    coordinates_BTA = coordinates(grid)[order_T][None]
    return Context.whole(jnp.arange(len(order_T))[None]).replace(coordinates_BTA=coordinates_BTA)


class Final(nn.Module):
    """A norm, shift and scale of the conditioning vector, and a Linear that starts at zero."""

    features: int
    norm: str
    modulation: str
    precision: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array) -> jax.Array:
        affine = build("modulation", self.modulation, name="modulation").final(condition_BD, self.precision)
        normed_BTD = affine.modulate(build("norm", self.norm, name="norm")(x_BTD))
        zeros = nn.initializers.zeros
        linear = Linear(self.features, ("embed", None), self.precision, True, jnp.float32, zeros)
        nn.share_scope(self, linear)
        return linear(normed_BTD)


# Fields that the model has under the same names.
_FIELDS = (
    *("patch", "learned_sigma", "time_denominator", "tile"),
    *("text_length", "text_dim", "any_size", "pooled_dim", "text_embed"),
)


@register("embed", "patches", choices={"text_embed": ("mlp", "linear")})
@dataclasses.dataclass(frozen=True)
class Patches(Ends):
    """Patches of images in and out; a side and channels of 0 and classes of None take the data's value.

    `size` is that of pictures that are not square, in the place of their side: `(height, width)`, and of clips
    `(frames, height, width)`. With `any_size` it is that of the data, and the spec's where there are none. A model with
    `text_length` and `text_dim` reads the states of texts instead of labels; its mixers inherit the length.
    `ffn_norm_eps` is that of the norm before the ffn where it differs from the others'.
    """

    patch: int = 2
    side: int = 0
    size: tuple = ()
    channels: int = 0
    classes: int = None
    learned_sigma: bool = False
    time_denominator: int = FREQUENCIES
    ffn_norm_eps: float = 0.0
    tile: int = 1
    text_length: int = 0
    text_dim: int = 0
    any_size: bool = False
    pooled_dim: int = 0
    text_embed: str = "mlp"

    reads: typing.ClassVar[str] = Denoiser.reads
    unknown: typing.ClassVar[None] = None

    def is_complete(self, size: typing.Any) -> bool:
        """Whether the spec says all that the model needs to know of its data."""
        return bool((self.side or self.size) and self.channels) and (self.classes is not None or bool(self.text_dim))

    def inherited(self) -> dict[str, typing.Any]:
        return {"text_length": self.text_length} if self.text_length else {}

    def model(
        self, backbone: dict[str, typing.Any], model: Config, size: typing.Any, picture: ImageFormat | None
    ) -> Denoiser:
        """Builds the model of `config.model` from the fields of its `backbone`, for the pictures of the data."""
        picture = self._with_data(picture)
        if any(side % (self.patch * self.tile) for side in picture.size[-2:]):
            sides = (
                f"side {picture.side}" if isinstance(picture.side, int) else f"{picture.size[-2]} x {picture.size[-1]}"
            )
            raise UserError(
                f"config.model.embed: patch = {self.patch}, tile = {self.tile}: pictures of {sides} are no "
                f"multiple of {self.patch * self.tile}; take a patch that divides them"
            )
        norm = complete_spec("norm", model.norm, size.defaults() | {"eps": self.ffn_norm_eps})
        fields = {key: getattr(self, key) for key in _FIELDS}
        fields |= {"size": picture.size, "channels": picture.channels, "classes": picture.classes}
        return Denoiser(**backbone, **fields, ffn_norm=norm if self.ffn_norm_eps else "")

    def _with_data(self, picture):
        """The picture of the spec; what it leaves open is the data's, and what it says must fit the data."""
        fields = {"side": self._side(), "channels": self.channels or None, "classes": self.classes}
        fields = {key: value for key, value in fields.items() if value is not None}
        if picture is None:  # a model is checked before its data are read
            return ImageFormat(self.patch * self.tile, 1, 1)._replace(**fields)
        if self.any_size:
            fields.pop("side", None)
        if self.text_length:  # the data's classes are told as texts
            picture = picture._replace(classes=0)
        for key, value in fields.items():
            of_data = getattr(picture, key)
            if (value < of_data) if key == "classes" else value != of_data:  # classes may be more than the data has
                raise UserError(
                    f"config.model.embed: {key} = {value}: the pictures of config.data have {of_data}; take other "
                    "data, or leave it out to take theirs"
                )
        return picture._replace(**fields)

    def _side(self):
        """The `ImageFormat.side` of the spec, or None."""
        if not self.size:
            return self.side or None
        if len(self.size) not in (2, 3):
            raise UserError(
                f"config.model.embed: size = {self.size}: must be (height, width), or (frames, height, width)"
            )
        side = ImageFormat.of_size(tuple(self.size), 0, 0).side
        if self.side not in (0, side):
            raise UserError(f"config.model.embed: side = {self.side}, size = {self.size}: give one of them")
        return side
