"""Consistency checks of a quantized leaf's arrays: rows, groups, inputs, dtypes, and finite numbers."""

import dataclasses
import math
import typing

import numpy as np

from efficientllm.errors import UserError

if typing.TYPE_CHECKING:
    from efficientllm.quant.base import GroupedRows, Rows


def require(holds: bool, problem: str) -> None:
    """Raise UserError with the problem unless `holds`."""
    if not holds:
        raise UserError(problem)


def check_flag(leaf: "Rows") -> None:
    """Raise UserError unless the leaf's `is_table` is a bool."""
    require(isinstance(leaf.is_table, bool), f"is_table = {leaf.is_table!r} is neither true nor false")


def check_array(name: str, array: typing.Any, dtypes: tuple[typing.Any, ...]) -> None:
    """Raise UserError unless `array` is an array of one of the dtypes that has rows and columns."""
    require(hasattr(array, "dtype") and hasattr(array, "shape"), f"{name} is no array")
    allowed = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    require(array.dtype in map(np.dtype, dtypes), f"{name} is {array.dtype}, not {allowed}")
    require(array.ndim >= 2 and math.prod(array.shape) > 0, f"{name} {list(array.shape)} has no rows or no columns")


def check_groups(leaf: "GroupedRows", values_dtype: type, scale_dtype: type, codes_per_value: int) -> None:
    """Raise UserError unless the values, scales and columns of a `base.GroupedRows` fit each other."""
    check_array("values", leaf.values, (values_dtype,))
    check_array("scale", leaf.scale, (scale_dtype,))
    rows, groups, width = leaf.values.shape[:-1], leaf.scale.shape[-1], leaf.values.shape[-1]
    shown = f"values {list(leaf.values.shape)}"
    require(leaf.scale.shape[:-1] == rows, f"scale {list(leaf.scale.shape)} has not the rows of {shown}")
    require(width % groups == 0, f"scale of {groups} groups, which do not divide {shown}")
    group = codes_per_value * width // groups
    most, columns = groups * group, leaf.columns
    require(
        isinstance(columns, int) and not isinstance(columns, bool) and most - group < columns <= most,
        f"columns = {columns!r}; {groups} groups of {group} hold {most - group + 1} to {most}",
    )


def check_finite(leaf: typing.Any) -> None:
    """Raise UserError for an array of the leaf with NaN or infinity; `values` are not read."""
    for field in dataclasses.fields(leaf):
        array = getattr(leaf, field.name)
        if field.name == "values" or not hasattr(array, "dtype") or np.issubdtype(array.dtype, np.integer):
            continue
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(f"{field.name} holds NaN or infinity")
