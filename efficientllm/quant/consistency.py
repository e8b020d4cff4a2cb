"""Checks that the arrays of a quantized leaf fit each other: rows, groups, inputs, dtypes, and finite numbers."""

import dataclasses
import math

import numpy as np

from efficientllm.errors import UserError


def require(holds: bool, problem: str) -> None:
    """Raises UserError with the problem unless it holds."""
    if not holds:
        raise UserError(problem)


def check_flag(leaf) -> None:
    """Raises UserError unless the leaf's `is_table` is a bool."""
    require(isinstance(leaf.is_table, bool), f"is_table = {leaf.is_table!r} is neither true nor false")


def check_array(name: str, array, dtypes: tuple) -> None:
    """Raises UserError unless an array has one of the dtypes, rows and columns."""
    require(hasattr(array, "dtype") and hasattr(array, "shape"), f"{name} is no array")
    allowed = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    require(array.dtype in map(np.dtype, dtypes), f"{name} is {array.dtype}, not {allowed}")
    require(array.ndim >= 2 and math.prod(array.shape) > 0, f"{name} {list(array.shape)} has no rows or no columns")


def check_groups(leaf, values_dtype, scale_dtype, codes_per_value: int) -> None:
    """Raises UserError unless the values, scales and columns of a `base.GroupedRows` fit each other."""
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


def check_finite(leaf) -> None:
    """Raises UserError naming an array of the leaf that holds NaN or infinity; reads all but the values."""
    for field in dataclasses.fields(leaf):
        array = getattr(leaf, field.name)
        if field.name == "values" or not hasattr(array, "dtype") or np.issubdtype(array.dtype, np.integer):
            continue
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(f"{field.name} holds NaN or infinity")
