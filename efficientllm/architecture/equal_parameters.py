"""Equal parameter counts: the ffn width at which one architecture has as many parameters as another.

Runs of equal size compare the technique and not the number of parameters.
"""

import dataclasses
import typing

from efficientllm.architecture.sizes import Size
from efficientllm.errors import UserError

TOLERANCE = 0.02


def matched(size: Size, wanted: int, count: typing.Callable[[Size], int], reference: str) -> Size:
    """Changes the width `hidden` of `size` so that `count(size)` is within TOLERANCE of `wanted`.

    `inner` is changed instead where no block inherits `hidden`. `reference` is the value of
    `config.model.parameters_of`. Raises UserError where no width comes close enough.
    """
    # Matrix units are fastest on widths that are multiples of their tiles.
    multiple = 8 if size.dim < 512 else 64
    for field in ("hidden", "inner"):
        # The count is linear in a width, so two counts give its slope.
        low, high = (_with_width(size, field, times * size.dim) for times in (1, 2))
        slope = (count(high) - count(low)) / size.dim
        if slope == 0:
            continue
        width = size.dim + (wanted - count(low)) / slope
        candidate = _with_width(size, field, max(multiple, round(width / multiple) * multiple))
        if abs(count(candidate) / wanted - 1) <= TOLERANCE:
            return candidate
    raise UserError(
        f"config.model.parameters_of = {reference!r}: no width gives this model {wanted:,} parameters; "
        "set it to '' to keep the widths of the size"
    )


def _with_width(size, field, width):
    return dataclasses.replace(size, **{field: width})
