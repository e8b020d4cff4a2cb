"""Whether the arrays of a quantised leaf fit each other: rows, groups, inputs, dtypes, and finite numbers."""

import math

import ml_dtypes
import numpy as np

from efficientllm.errors import UserError
from efficientllm.quant.float16 import Half
from efficientllm.quant.int4 import Int4
from efficientllm.quant.int8 import Int8
from efficientllm.quant.nf4 import NF4

# leaf -> (dtype of its values, of its scale, weights in a value).
_GROUPED = {Int4: (np.uint8, np.float16, 2), Int8: (np.int8, np.float32, 1), NF4: (np.uint8, np.float32, 2)}
_HALVES = (np.float16, ml_dtypes.bfloat16)


def check(leaf):
    """Raises UserError with what does not fit; shapes and dtypes alone are read, no array."""
    _require(isinstance(leaf.is_table, bool), f"is_table = {leaf.is_table!r} is neither true nor false")
    if isinstance(leaf, Half):
        _check_array("values", leaf.values, _HALVES)
        return
    values, scale, per_value = _GROUPED[type(leaf)]
    _check_array("values", leaf.values, (values,))
    _check_array("scale", leaf.scale, (scale,))
    rows, groups, width = leaf.values.shape[:-1], leaf.scale.shape[-1], leaf.values.shape[-1]
    shown = f"values {list(leaf.values.shape)}"
    _require(leaf.scale.shape[:-1] == rows, f"scale {list(leaf.scale.shape)} has not the rows of {shown}")
    _require(width % groups == 0, f"scale of {groups} groups, which do not divide {shown}")
    group = per_value * width // groups
    most, columns = groups * group, leaf.columns
    _require(
        isinstance(columns, int) and not isinstance(columns, bool) and most - group < columns <= most,
        f"columns = {columns!r}; {groups} groups of {group} hold {most - group + 1} to {most}",
    )
    if isinstance(leaf, Int4):
        _check_int4(leaf)


def check_finite(leaf):
    """Raises UserError naming an array that holds a number that is none; reads all but the values."""
    for name in ("scale", "minimum", "x_scale"):
        array = getattr(leaf, name, None)
        if array is not None and not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(f"{name} holds NaN or infinity")


def _check_int4(leaf):
    _require(leaf.x_bits in (8, 16), f"x_bits = {leaf.x_bits!r} is neither 8 nor 16")
    _require(leaf.zero is None or leaf.minimum is None, "zero and minimum both")
    for name, kinds in (("zero", (np.uint8,)), ("minimum", (np.float16,))):
        array = getattr(leaf, name)
        if array is not None:
            _check_array(name, array, kinds)
            shown = f"{name} {list(array.shape)}"
            _require(array.shape == leaf.scale.shape, f"{shown} is not of the shape of scale {list(leaf.scale.shape)}")
    if leaf.x_scale is not None:
        _check_array("x_scale", leaf.x_scale, (*_HALVES, np.float32))
        wanted = (*leaf.values.shape[:-2], 1, leaf.columns)
        _require(leaf.x_scale.shape == wanted, f"x_scale {list(leaf.x_scale.shape)} is not {list(wanted)}")


def _check_array(name, array, kinds):
    _require(hasattr(array, "dtype") and hasattr(array, "shape"), f"{name} is no array")
    known = " or ".join(np.dtype(kind).name for kind in kinds)
    _require(array.dtype in map(np.dtype, kinds), f"{name} is {array.dtype}, not {known}")
    _require(array.ndim >= 2 and math.prod(array.shape) > 0, f"{name} {list(array.shape)} has no rows or no columns")


def _require(holds, problem):
    if not holds:
        raise UserError(problem)
