"""Letters drawn from the fonts of matplotlib, and what all pictures drawn from fonts depend on."""

import dataclasses
import importlib.util
import pathlib
import string
import typing

import numpy as np

from efficientllm.data import cache
from efficientllm.data.base import ImageSource, Picture
from efficientllm.errors import FieldError
from efficientllm.registry import register
from efficientllm.runtime import optional_packages
from efficientllm.untrusted import patterns

_LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
_FONTS = ("DejaVu*.ttf", "STIXGeneral*.ttf", "cm*.ttf")  # the rest are of symbols
_SYMBOLS = ("cmex10", "cmsy10")  # letters of Computer Modern's code page that draw other things
EM = 0.75  # of the height of a picture, so that the widest letters and emoji fit
ABSENT = "\U0010fffe"  # a character of no font: fonts draw a box for it


@register("data", "glyphs")
@dataclasses.dataclass(frozen=True)
class Glyphs(ImageSource):
    """Letters of the fonts that matplotlib ships, white on black: a class is a letter, a style a font.

    22 fonts have the 62 letters and digits that are drawn by default. `style` is a regex over names of fonts: "cm" is
    the Computer Modern family, "Serif" DejaVu's serif fonts.
    """

    size: int = 32
    letters: str = _LETTERS
    style: str = ""
    channels: int = 3
    held_out: float = 0.05

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(self.letters))

    def key(self) -> str:
        """Changes with the fonts, with FreeType, which draws them, or a field."""
        return f"{self} {drawing_key()} {cache.stat_key(self.fonts())}"

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields a picture of each letter of each font that has it."""
        for letter, font, style in font_letters(self, EM):
            yield Picture(draw_letter(font, letter, self.size), letter, name=f"{letter!r} of {style}")

    def fonts(self) -> list[pathlib.Path]:
        """The files of the fonts. Raises UserError where there are none."""
        folder = find_package("glyphs", "matplotlib") / "mpl-data" / "fonts" / "ttf"
        paths = [path for pattern in _FONTS for path in sorted(folder.glob(pattern)) if path.stem not in _SYMBOLS]
        if not paths:
            raise FieldError("data", f"{folder} has no fonts; install matplotlib anew, or use images(path=...)")
        style = patterns.compile(self.style, "style")
        chosen = [path for path in paths if style.search(path.stem)]
        if not chosen:
            names = ", ".join(path.stem for path in paths)
            raise FieldError("data", f"style = {self.style!r}: finds none of the fonts; they are {names}")
        return chosen


def font_letters(source: Glyphs, em: float) -> typing.Iterator[tuple[str, typing.Any, str]]:
    """Yields `(letter, font, style)` of each letter of each font that has it; `em` is a share of the height."""
    if not source.letters.strip():
        raise FieldError("data", "letters = '': is empty; name the letters to draw")
    for path in source.fonts():
        font = load_font(path, source.size * em)
        absent = bytes(font.getmask(ABSENT))
        for letter in dict.fromkeys(source.letters):
            mask = bytes(font.getmask(letter))
            if any(mask) and mask != absent:
                yield letter, font, path.stem


def find_package(source: str, package: str) -> pathlib.Path:
    """Returns the folder of a package, which is not imported. Raises UserError, for a `source`, where it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        raise FieldError(
            "data", f"{source} needs the fonts of the package {name}: {optional_packages.remedy('images')}"
        )
    return pathlib.Path(spec.submodule_search_locations[0])


def drawing_key() -> str:
    """Returns what pictures depend on beside the fonts: it changes with FreeType."""
    from PIL import features

    return f"{features.version('freetype2')} {EM}"


def load_font(path: pathlib.Path, size: float) -> typing.Any:
    """Opens a font at `size` pixels an em."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw_letter(font: typing.Any, letter: str, size: int) -> np.ndarray:
    """Draws a letter in the middle of uint8 `[size, size]`."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).text((size / 2, size / 2), letter, fill=255, font=font, anchor="mm")
    return np.asarray(image)
