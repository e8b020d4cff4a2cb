"""Aspect-ratio and frame-count buckets: the few sizes of pictures, or clips, that a data set is trained at.

A picture is resized and cropped to the bucket nearest to it in aspect, a clip to the most frames that it has. A batch
is of one bucket (`data.rows.images.BucketRows`).
"""

import math
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.data.base import ImageSource
from efficientllm.errors import UserError, short_repr

Shape = tuple[int, ...]
LARGEST = 2**14  # pixels of a side, frames of a clip
MOST = 64  # buckets, of each of which there is a compiled program
WIDEST = 2.0  # the aspect ratios of a number of buckets go from 1:2 to 2:1


def bucket_shapes(source: ImageSource, multiple: int) -> tuple[Shape, ...]:
    """Returns the shapes of a source's buckets, `(h, w, C)`, of clips `(F, h, w, C)`.

    n buckets have the aspect ratios `2^(-1 + 2 i / (n - 1))`, about the area of `size` squared, and sides rounded to a
    multiple of `multiple`. Raises UserError for a field that says no buckets, and for sides that are no multiple.
    """
    sizes, frames = _sizes(source, multiple), _frame_counts(source)
    shapes = tuple((*count, *size, source.channels) for count in frames for size in sizes)
    if len(shapes) > MOST:
        raise UserError(f"buckets, shorter: are {len(shapes)} buckets together; each is compiled, take {MOST} at most")
    return shapes


def nearest_bucket(shapes: Sequence[Shape], height: int, width: int, frames: int = 0) -> int:
    """Returns the index of the bucket of a picture, or of a clip of `frames` frames, -1 for a clip that is too short.

    Of the most frames that a clip has, it is the one with the least |log(aspect of bucket / aspect of picture)|, the
    first of equal ones.
    """
    fitting = [index for index, shape in enumerate(shapes) if frame_count(shape) <= frames]
    most = max((frame_count(shapes[index]) for index in fitting), default=0)

    def distance(index):
        *_, h, w, _ = shapes[index]
        return abs(math.log(w / h) - math.log(width / height))

    return min((index for index in fitting if frame_count(shapes[index]) == most), key=distance, default=-1)


def frame_count(shape: Shape) -> int:
    """Returns the frames of a shape, 0 of pictures."""
    return shape[0] if len(shape) == 4 else 0


def describe_size(shape: Shape) -> str:
    """Describes a shape in words: `512 x 768`, `17 frames of 480 x 832`."""
    *frames, height, width, _ = shape
    return f"{frames[0]} frames of {height} x {width}" if frames else f"{height} x {width}"


def count_pictures(shape: Shape, bucket: int, of_sides: dict[str, np.ndarray]) -> dict[str, typing.Any]:
    """Counts the pictures of a bucket, of whose sides the buckets of all pictures are given."""
    counts = {f"{side}_images": int((buckets == bucket).sum()) for side, buckets in of_sides.items()}
    return {"size": describe_size(shape), **counts}


def _sizes(source, multiple):
    """`(h, w)` of each aspect ratio."""
    if isinstance(source.buckets, int):
        check_side("size", source.size, multiple)
        if not 1 <= source.buckets <= MOST:
            raise UserError(f"buckets = {source.buckets}: must be from 1 to {MOST}, or a tuple of sizes")
        return _of_equal_area(source.size, source.buckets, multiple)
    if not source.buckets:
        raise UserError("buckets = (): is empty; write ((height, width), ...), or how many aspect ratios there are")
    for pair in source.buckets:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"buckets: {short_repr(pair)} is no size; write ((height, width), ...)")
        for side in pair:
            check_side("buckets: a side", side, multiple)
    return tuple(dict.fromkeys(map(tuple, source.buckets)))


def _of_equal_area(size, count, multiple):
    if count == 1:
        return ((size, size),)
    aspects = WIDEST ** np.linspace(-1, 1, count)
    sides = [(size / math.sqrt(aspect), size * math.sqrt(aspect)) for aspect in aspects]
    return tuple(dict.fromkeys(tuple(max(1, round(side / multiple)) * multiple for side in pair) for pair in sides))


def _frame_counts(source):
    """`(F,)` of the clips of each bucket, the longest last; `()` of pictures."""
    if not source.frames:
        return [()]
    for count in source.shorter:
        if type(count) is not int or not 1 <= count < source.frames:
            raise UserError(
                f"shorter = {short_repr(source.shorter)}: must be whole numbers from 1 to {source.frames - 1}, below "
                f"frames = {source.frames}"
            )
    return [(count,) for count in sorted({*source.shorter, source.frames})]


def check_side(name: str, side: typing.Any, multiple: int) -> None:
    """Raises UserError for a side of pictures that is no whole number, or no multiple of `multiple`."""
    if type(side) is not int or not 1 <= side <= LARGEST:
        raise UserError(f"{name} = {short_repr(side)}: must be a whole number from 1 to {LARGEST}")
    if side % multiple:
        lower, upper = side - side % multiple, side + -side % multiple
        sides = " or ".join(str(number) for number in (lower, upper) if number)
        raise UserError(f"{name} = {side}: is no multiple of the {multiple} pixels of a token; write {sides}")
