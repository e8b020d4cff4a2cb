"""Equal parameters: the width at which one architecture has as many as another, so that runs compare the technique."""

import dataclasses

from efficientllm.errors import UserError

TOLERANCE = 0.02


def matched(size, wanted, count, reference):
    """`size` with the `hidden` (or, where nothing inherits that, the `inner`) that makes `count(size)` about `wanted`.

    Raises UserError where no width comes within TOLERANCE.
    """
    # Parameters grow in proportion to a width; matrix units like widths that are multiples.
    multiple = 8 if size.dim < 512 else 64
    for field in ("hidden", "inner"):
        low, high = (dataclasses.replace(size, **{field: times * size.dim}) for times in (1, 2))
        parameters_a_unit = (count(high) - count(low)) / size.dim
        if parameters_a_unit == 0:
            continue
        value = size.dim + (wanted - count(low)) / parameters_a_unit
        found = dataclasses.replace(size, **{field: max(multiple, round(value / multiple) * multiple)})
        if abs(count(found) / wanted - 1) <= TOLERANCE:
            return found
    raise UserError(
        f"config.model.parameters_of = {reference!r}: no width gives this model {wanted:,} parameters; "
        "set it to '' and they stay as they are"
    )
