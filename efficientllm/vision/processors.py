"""Image processors of vision-language models, in numpy and Pillow: a picture becomes patches.

Numbers are those of transformers' Pillow processors, bit for bit. Letters: C channels, h and w pixels, P patches, c
features of a patch.
"""

import dataclasses
import math
import pathlib
import typing

import numpy as np

from efficientllm.embeds.vision_language import VisionLM
from efficientllm.errors import UserError
from efficientllm.untrusted import files, json_text
from efficientllm.vision.resize_rules import rounded_size, shortest_edge_size, tile_grid
from efficientllm.vision.tower_rows import PreparedImage

if typing.TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILES = ("preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass(frozen=True)
class Processor:
    """Base class of processors.

    Args:
      patch, merge, frames: the sides of patches in pixels and of merge groups in patches, and the frames of a patch.
      mean, std, factor: a pixel is multiplied by `factor`, less `mean`, over `std`, each a number a channel.
      resample: Pillow's number of the filter; 3 is bicubic.
    """

    patch: int
    merge: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: float = 1 / 255
    resample: int = 3

    def tiles(self, image: "Image.Image") -> list["Image.Image"]:
        """Resizes an RGB image and cuts it into the pictures that the tower reads, of one size."""
        raise NotImplementedError(f"{type(self).__name__} defines no tiles(image)")

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Returns tiles, rows and columns of patches of an image by its size alone."""
        raise NotImplementedError(f"{type(self).__name__} defines no grid(height, width)")

    def tokens(self, height: int, width: int) -> int:
        """Counts the tokens that stand for an image."""
        return math.prod(self.grid(height, width)) // self.merge**2

    def prepare(self, image: "Image.Image") -> PreparedImage:
        """Makes the patches of an RGB image."""
        grid = self.grid(image.height, image.width)
        pixels = np.concatenate([self._patches(np.asarray(tile)) for tile in self.tiles(image)])
        return PreparedImage(pixels, grid, math.prod(grid) // self.merge**2)

    def _patches(self, pixels_hwC):
        scaled_hwC = (pixels_hwC.astype(np.float64) * self.factor).astype(np.float32)
        normed_hwC = (scaled_hwC - np.float32(self.mean)) / np.float32(self.std)
        h, w, C = normed_hwC.shape
        p, m = self.patch, self.merge
        x = normed_hwC.reshape(h // p // m, m, p, w // p // m, m, p, C).transpose(0, 3, 1, 4, 6, 2, 5)
        x = np.broadcast_to(x[:, :, :, :, :, None], (*x.shape[:5], self.frames, p, p))  # a picture stands still
        return x.reshape(-1, C * self.frames * p * p)

    def _resized(self, image, size):
        return image.resize(size[::-1], resample=self.resample)


@dataclasses.dataclass(frozen=True)
class AnySize(Processor):
    """Qwen2-VL's processor: the sides of an image are rounded to merge groups, within limits of its pixels."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image is resized to."""
        return rounded_size(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        rows, columns = (side // self.patch for side in self.size(height, width))
        return 1, rows, columns

    def tiles(self, image: "Image.Image") -> list["Image.Image"]:
        return [self._resized(image, self.size(image.height, image.width))]


def within(processor: Processor, max_pixels: int, where: str) -> Processor:
    """Returns the processor with a lower limit of pixels, 0 for its own; those of one size or of tiles stay.

    Raises UserError, beginning with `where` the limit comes from, for one below the fewest pixels of a picture.
    """
    if not max_pixels or not isinstance(processor, AnySize):
        return processor
    if max_pixels < processor.min_pixels:
        least = f"the model's processor gives a picture {processor.min_pixels} pixels at least"
        raise UserError(f"{where}: max_pixels = {max_pixels}: {least}; raise it, or leave it out")
    return dataclasses.replace(processor, max_pixels=min(max_pixels, processor.max_pixels))


@dataclasses.dataclass(frozen=True)
class CenterCrop(Processor):
    """CLIP's processor: the shorter side becomes `side`, and the middle square of `crop` pixels is cut out."""

    side: int = 336
    crop: int = 336

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, self.crop // self.patch, self.crop // self.patch

    def tiles(self, image: "Image.Image") -> list["Image.Image"]:
        height, width = shortest_edge_size(image.height, image.width, self.side)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        resized = self._resized(image, (height, width))
        return [resized.crop((left, top, left + self.crop, top + self.crop))]


@dataclasses.dataclass(frozen=True)
class Tiles(Processor):
    """InternVL's processor: up to `most` tiles of `side` pixels, and the whole image small where there are several."""

    side: int = 448
    fewest: int = 1
    most: int = 12

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        tiles = math.prod(self._layout(height, width))
        return tiles + (tiles > 1), self.side // self.patch, self.side // self.patch

    def _layout(self, height, width):
        return tile_grid(height, width, self.side, self.fewest, self.most)

    def tiles(self, image: "Image.Image") -> list["Image.Image"]:
        columns, rows = self._layout(image.height, image.width)
        side = self.side
        whole = self._resized(image, (side * rows, side * columns))
        boxes = [(side * c, side * r, side * (c + 1), side * (r + 1)) for r in range(rows) for c in range(columns)]
        tiles = [whole.crop(box) for box in boxes]
        return tiles if len(tiles) == 1 else [*tiles, self._resized(image, (side, side))]


def read_processor(folder: pathlib.Path | None, lm: VisionLM) -> Processor:
    """Reads the processor of a model's folder: its kind is that of the model's tower, its numbers the files'.

    Without a folder, or a file in it, numbers are the defaults of the processor's class.

    Raises UserError for a key that would change a picture and cannot be honoured.
    """
    config, where = ({}, pathlib.Path(FILES[0])) if folder is None else _read_config(folder)
    keys = _Keys(config, where)
    for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        keys.expect(flag, True)
    keys.expect("do_pad", False)
    tower = lm.vision
    tiled, is_clip = tower.grid > 0 and tower.norm_after_merge, tower.grid > 0 and not tower.norm_after_merge
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if tiled else (CLIP_MEAN, CLIP_STD)
    common: dict[str, typing.Any] = {"patch": tower.patch, "merge": tower.merge, "frames": tower.frames}
    common |= {"mean": keys.numbers("image_mean", mean), "std": keys.numbers("image_std", std)}
    common |= {"factor": keys.number("rescale_factor", 1 / 255, float), "resample": keys.number("resample", 3)}
    for name, ours in (("patch_size", tower.patch), ("merge_size", tower.merge), ("temporal_patch_size", tower.frames)):
        if not tower.grid:
            keys.expect(name, ours)
    if not tower.grid:
        return AnySize(**common, **_limits(keys))
    side = tower.grid * tower.patch
    if is_clip:
        keys.expect("do_center_crop", True)
        keys.expect("crop_size", side, {"height": side, "width": side})
        return CenterCrop(**common, side=keys.side("size", "shortest_edge", side), crop=side)
    keys.expect("size", side, {"height": side, "width": side})
    return Tiles(**common, side=side, fewest=keys.number("min_patches", 1), most=keys.number("max_patches", 12))


def _read_config(folder):
    for name in FILES:
        if files.is_there(folder / name):
            config = json_text.read(folder / name)
            inner = config.get("image_processor", config) if isinstance(config, dict) else None
            if not isinstance(inner, dict):
                raise UserError(f"{folder / name}: is no description of an image processor; take the model's own")
            if name == FILES[0] or "image_processor" in config:
                return inner, folder / name
    return {}, folder / FILES[0]


def _limits(keys):
    """The fewest and most pixels, by the keys of either generation of files."""
    size = keys.config.get("size") or {}
    limits = {}
    for name, newer in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        chosen = keys.config.get(name) or (size.get(newer) if isinstance(size, dict) else None)
        if chosen is not None:
            limits[name] = _Keys({name: chosen}, keys.where).number(name, 0)
    fewest, most = (limits.get(name, getattr(AnySize, name)) for name in ("min_pixels", "max_pixels"))
    if fewest > most:
        raise UserError(f"{keys.where}: min_pixels = {fewest} is over max_pixels = {most}; take the model's own file")
    return limits


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of a processor's file, checked as they are read."""

    config: dict[str, typing.Any]
    where: pathlib.Path

    def expect(self, name, *known):
        value = self.config.get(name)
        if value is not None and value not in known:
            raise UserError(f"{self.where}: {name} = {value!r}: the model's processor has {known[0]!r}; give that")

    def number(self, name, default, kind=int):
        value = self.config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**40:
            raise UserError(f"{self.where}: {name} = {value!r}: must be a positive number; take the model's own file")
        return value

    def numbers(self, name, default):
        values = self.config.get(name, default)
        right = isinstance(values, list | tuple) and len(values) == 3
        if not right or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise UserError(f"{self.where}: {name} = {values!r}: must be three numbers; take the model's own file")
        return tuple(map(float, values))

    def side(self, name, inner, default):
        value = self.config.get(name)
        value = value.get(inner) if isinstance(value, dict) else value
        return _Keys({name: value}, self.where).number(name, default)


def load_picture(content: typing.Any, name: str) -> "Image.Image":
    """Loads an image file's path, its bytes, an array or a PIL image as RGB: upright, the first frame, on white.

    Raises UserError, beginning with the record's `name`, for what is no picture, damaged or too large.
    """
    from efficientllm.data.base import Picture as Content
    from efficientllm.data.images import decode

    try:
        return decode.convert(decode.load(decode.read(Content(content))), 3)
    except decode.Unusable as error:
        detail = f" ({error.detail})" if error.detail else ""
        raise UserError(f"{name}: {error.reason} are not read{detail}; give another picture") from None
