"""Vision tower: patches of images in, features for the token slots of a language model out.

One description covers the towers of Qwen2.5-VL (arXiv:2502.13923), Qwen2-VL (arXiv:2409.12191), LLaVA-1.5
(arXiv:2310.03744; CLIP: arXiv:2103.00020) and InternVL3 (arXiv:2504.10479). Letters: S slots of patches, c features of
a patch, M merged features, m the side of a merge group.
"""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import FieldError
from efficientllm.ffns.dense import GELUS
from efficientllm.layers import Linear
from efficientllm.mixers.base import Mixer
from efficientllm.model import Backbone
from efficientllm.ops.attention import Context, Mask
from efficientllm.registry import build, complete_spec, register
from efficientllm.registry.block_entries import parse_entry
from efficientllm.typing import Config
from efficientllm.weights import Precision


class PatchArrays(typing.NamedTuple):
    """Patches of the images of each row, groups of m x m that become one feature side by side.

    Args:
      pixels_BSc: float32, features in the order channel, frame, row, column; zeros where a slot is no patch.
      positions_BS: rows of a table of positions: 0 for a class token, then patches in raster order.
      coordinates_BSA: `(row, column)` in the image.
      frames_BS: which image, tile or frame a slot belongs to, from 1; 0 is padding.
      windows_BS: the window of each slot, from 1, in bins of `mixers.image_window`; None where no layer has windows.
    """

    pixels_BSc: jax.Array
    positions_BS: jax.Array
    coordinates_BSA: jax.Array
    frames_BS: jax.Array
    windows_BS: jax.Array | None = None


class Images(typing.NamedTuple):
    """Images of rows of tokens.

    Args:
      slots_BT: the feature that stands in a token's place, among the merged ones of its own row; -1 for text.
      patches: of the images; None where their features are given.
      features_BMD: of the images, `VisionTower`'s output; None computes them.
    """

    slots_BT: jax.Array
    patches: PatchArrays | None = None
    features_BMD: jax.Array | None = None


class Projector(nn.Module):
    """Merge of m x m neighbours, and two linear maps with an exact GELU between: `[B, S, D] -> [B, S / m^2, out]`.

    Args:
      group: m^2 patches that are concatenated.
      norm: before the maps, "" for none; it is of a patch, or with `norm_after_merge` of a group.
    """

    group: int
    norm: str
    norm_after_merge: bool
    hidden: int
    features: int
    use_bias: bool
    precision: str

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        B, S, D = x_BSD.shape
        merged = (B, S // self.group, self.group * D)
        x = x_BSD.reshape(merged) if self.norm_after_merge else x_BSD
        x = build("norm", self.norm, name="norm")(x) if self.norm else x
        x_BMe = Linear(self.hidden, ("embed", "mlp"), self.precision, self.use_bias, name="0")(x.reshape(merged))
        return Linear(self.features, ("mlp", "embed"), self.precision, self.use_bias, name="2")(GELUS["erf"](x_BMe))


class VisionTower(Backbone, kw_only=True):
    """A vision transformer and what maps its patches to vectors of a language model.

    Args:
      channels, patch, frames: features of a patch are `channels * frames * patch^2`.
      grid: the side in patches of images with a table of positions; 0 is any size.
      features: the width of the language model. The other fields are those of `ViT`.
    """

    patch: int
    frames: int
    channels: int
    grid: int
    merge: int
    window: int
    patch_bias: bool
    class_token: bool
    embed_norm: bool
    final_norm: str
    projector_norm: str
    norm_after_merge: bool
    projector_hidden: int
    projector_bias: bool
    features: int

    order: typing.ClassVar[str] = "bidirectional"
    reads: typing.ClassVar[str] = "patches"
    behind_blocks: typing.ClassVar[tuple[str, ...]] = ("norm", "projector")

    @nn.compact
    def __call__(self, patches: PatchArrays) -> jax.Array:
        """Computes the features of merge groups, `[B, S / m^2, features]`."""
        precision = Precision.of(self.precision)
        embedding = Linear(self.dim, (None, "embed"), self.precision, self.patch_bias, name="patch")
        x_BSD = embedding(patches.pixels_BSc.astype(precision.activation))
        if self.class_token:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            class_D = self.param("class_token", init, (self.dim,)).astype(x_BSD.dtype)
            x_BSD = jnp.where(patches.positions_BS[..., None] == 0, class_D, x_BSD)
        position = build("position", self.position, name="position")
        x_BSD = position.embed(x_BSD, patches.positions_BS)
        if self.embed_norm:
            x_BSD = build("norm", self.norm, name="embed_norm")(x_BSD)
        memo = self.init_memo(*patches.frames_BS.shape, position)
        x_BSD, _, _ = self.apply_blocks((x_BSD, memo), _context(patches), None)
        if self.final_norm:
            x_BSD = build("norm", self.final_norm, name="norm")(x_BSD)
        project = Projector(
            self.merge**2,
            self.projector_norm,
            self.norm_after_merge,
            self.projector_hidden,
            self.features,
            self.projector_bias,
            self.precision,
            name="projector",
        )
        return project(x_BSD)

    @property
    def pixel_features(self) -> int:
        """c, the numbers of a patch."""
        return self.channels * self.frames * self.patch**2

    def example(self, length: int) -> tuple:
        """Returns the arguments of `__call__` for one row of a single bin or group of patches."""
        slots = self.bin or self.merge**2
        zeros_1S = jnp.zeros((1, slots), jnp.int32)
        coordinates_1SA = jnp.zeros((1, slots, 2), jnp.int32)
        windows_1S = zeros_1S if self.bin else None
        pixels_1Sc = jnp.zeros((1, slots, self.pixel_features), jnp.float32)
        return (PatchArrays(pixels_1Sc, zeros_1S, coordinates_1SA, zeros_1S, windows_1S),)

    @property
    def bin(self) -> int:
        """The slots of a bin of whole windows; 0 without windows."""
        return (self.window * self.merge) ** 2

    def patch_side(self) -> int:
        return self.patch

    def mix_flops(self, mixer: Mixer, length: int, executed: bool = False) -> float:
        """Counts those of a row of `length` slots, which are whole bins of a mixer with windows."""
        if not mixer.bin:
            return super().mix_flops(mixer, length, executed)
        return length / mixer.bin * super().mix_flops(mixer, mixer.bin, executed)

    def kernel_rows(self, path: str, length: int) -> int:
        return length // self.merge**2 if path.startswith("projector/") else length


def _context(patches):
    mask = Mask(patches.frames_BS, order="bidirectional")
    coordinates = patches.coordinates_BSA
    return Context(patches.positions_BS, mask, coordinates_BTA=coordinates, windows_BT=patches.windows_BS)


@register("tower", "vit", example="vit(num_layers=2, dim=64, num_heads=2, hidden=96, patch=4, projector_hidden=64)")
@dataclasses.dataclass(frozen=True)
class ViT:
    """A vision transformer as a spec; see `VisionTower`.

    Args:
      num_layers, dim, num_heads, hidden: of its blocks; a head has `dim / num_heads` features.
      patch: the side of a patch in pixels; `frames` of a video make one patch, `channels` are of a picture.
      grid: the side of an image in patches where there is a table of positions, 0 for any size.
      pattern: entries `mixer | ffn`, as in `config.model.pattern`.
      patch_bias, class_token, embed_norm: a bias of the embedding of patches, a vector before them, and a norm after
        both.
      final_norm: the norm after the blocks, "" for none.
      window: the side of a window of `image_window` in merge groups, 0 for none.
      merge: the side of the square of patches that become one feature.
      projector_norm, norm_after_merge, projector_hidden, projector_bias: see `Projector`.
    """

    num_layers: int
    dim: int
    num_heads: int
    hidden: int
    projector_hidden: int
    patch: int = 14
    frames: int = 1
    channels: int = 3
    grid: int = 0
    pattern: tuple = ("mha(qkv_bias=True, o_bias=True) | gelu(use_bias=True)",)
    position: str = "none"
    norm: str = "layernorm(eps=1e-6)"
    final_norm: str = ""
    modulation: str = "plain"
    patch_bias: bool = False
    class_token: bool = False
    embed_norm: bool = False
    window: int = 0
    merge: int = 1
    projector_norm: str = ""
    norm_after_merge: bool = False
    projector_bias: bool = True

    def tower(self, model: Config, features: int) -> VisionTower:
        """Builds the tower of a language model of width `features`; `model` is `config.model`. Raises FieldError."""
        self._check()
        fields = dataclasses.asdict(self)
        pattern, num_heads, hidden = (fields.pop(name) for name in ("pattern", "num_heads", "hidden"))
        defaults = {"num_heads": num_heads, "head_dim": self.dim // num_heads, "hidden": hidden, "base": 10_000.0}
        defaults |= {"dim": self.dim, "norm": self.norm, "eps": 1e-6, "precision": model.precision}
        defaults |= {"attention_kernel": model.attention_kernel}
        fields["position"] = defaults["position"] = complete_spec("position", self.position, defaults)
        blocks = tuple(_block(entry, defaults) for entry in pattern)
        return VisionTower(
            **fields,
            blocks=blocks,
            residual="sequential",
            precision=model.precision,
            remat=model.remat,
            scan=True,
            unroll=model.unroll,
            features=features,
        )

    def _check(self):
        if self.dim % self.num_heads:
            raise FieldError("embed", f"tower: num_heads = {self.num_heads} does not divide dim = {self.dim}")
        if not self.pattern or self.num_layers % len(self.pattern):
            entries = f"{len(self.pattern)} entries do not divide num_layers = {self.num_layers}"
            raise FieldError("embed", f"tower: pattern of {entries}; write one that does")
        if self.grid % self.merge:
            raise FieldError("embed", f"tower: merge = {self.merge} does not divide grid = {self.grid}")


def _block(text, defaults):
    entry = parse_entry(text)
    mixers = [complete_spec("mixer", mixer, defaults, where="config.model.embed") for mixer in entry.mixers]
    return " + ".join(mixers), complete_spec("ffn", entry.ffn, defaults, where="config.model.embed")
