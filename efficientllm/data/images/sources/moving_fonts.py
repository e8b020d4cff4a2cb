"""Clips drawn from fonts: letters that move or turn."""

import dataclasses
import functools
import math
import typing

import numpy as np

from efficientllm.data.base import Picture
from efficientllm.data.images.sources.fonts import Glyphs, draw_letter, font_letters
from efficientllm.errors import FieldError
from efficientllm.registry import register
from efficientllm.untrusted import patterns

_EM = 0.5  # of the height of a clip: what moves by a quarter of it stays inside
_MOVES = {"moving right": (1, 0), "moving left": (-1, 0), "moving down": (0, 1), "moving up": (0, -1)}
_TURNS = {"turning right": -1, "turning left": 1}  # by half a turn; Pillow's angles count to the left
MOTIONS = (*_MOVES, *_TURNS)


@register("data", "moving_glyphs")
@dataclasses.dataclass(frozen=True)
class MovingGlyphs(Glyphs):
    """Letters of the fonts that matplotlib ships, white on black, each with each motion.

    A class is a letter and its motion, "A turning left", and so is the caption, "the letter A turning left"; a style is
    a font, of which 22 have the letters that are drawn by default. A letter moves by half a side at a constant speed,
    through the middle of the clip, by whole pixels, or turns by half a turn. `motion` is a regex over `MOTIONS`:
    "turning" is two of them.
    """

    frames: int = 17
    letters: str = "ABCDEFGHJKLMNPRT"
    motion: str = ""

    @functools.cached_property
    def motions(self) -> tuple[str, ...]:
        """The names of `MOTIONS` that `motion` finds. Raises FieldError where it finds none."""
        pattern = patterns.compile(self.motion, "motion")
        chosen = tuple(name for name in MOTIONS if pattern.search(name))
        if not chosen:
            raise FieldError(
                "data", f"motion = {self.motion!r}: finds none of the motions; they are {', '.join(MOTIONS)}"
            )
        return chosen

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{letter} {motion}" for letter in dict.fromkeys(self.letters) for motion in self.motions)

    def pictures(self) -> typing.Iterator[Picture]:
        """Yields a clip of each letter of each font with each motion."""
        for letter, font, style in font_letters(self, _EM):
            for motion in self.motions:
                draw = functools.partial(_draw, font, letter, motion, self.size, self.frames)
                caption, name = f"the letter {letter} {motion}", f"{letter!r} of {style}, {motion}"
                yield Picture(draw, f"{letter} {motion}", caption, name=name)


def _draw(font, letter, motion, size, frames):
    """uint8 `[frames, size, size]`."""
    still = draw_letter(font, letter, size)
    places = np.linspace(-1, 1, frames) if frames > 1 else np.zeros(1)
    if motion in _TURNS:
        return np.stack([_turn(still, 90 * _TURNS[motion] * (place + 1)) for place in places])
    across, down = _MOVES[motion]
    shifts = [math.floor(place * size / 4 + 0.5) for place in places]
    return np.stack([np.roll(still, (down * shift, across * shift), (0, 1)) for shift in shifts])


def _turn(pixels, angle):
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).rotate(angle, Image.Resampling.BICUBIC))
