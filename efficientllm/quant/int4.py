"""int4 weights with a scale for each group, by rounding to nearest, GPTQ or AWQ."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from efficientllm.errors import UserError, did_you_mean
from efficientllm.ops import native
from efficientllm.quant.base import STATIC, Form, GroupedRows, into_groups, pack, unpack
from efficientllm.quant.consistency import check_array, require
from efficientllm.registry import register
from efficientllm.typing import PyTree
from efficientllm.weights import Axes

METHODS = ("rtn", "awq", "gptq")


@flax.struct.dataclass
class Int4(GroupedRows):
    """int4 rows: `code * scale + minimum`, or `(code - zero) * scale`, or `(code - 8) * scale` without either.

    Codes 0..15 are packed as `base.pack` does, uint8 `[..., r, k / 2]`; scale and minimum are float16
    `[..., r, g]`, zero is uint8 `[..., r, g]`. `x_scale` `[..., 1, k]` multiplies the activations: AWQ's factors are
    not folded into another layer. The native product rounds activations to `x_bits` bits, scaled by a group's largest.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    minimum: jax.Array | None = None
    x_scale: jax.Array | None = None
    columns: int = flax.struct.field(default=0, **STATIC)
    x_bits: int = flax.struct.field(default=16, **STATIC)
    is_table: bool = flax.struct.field(default=False, **STATIC)

    name = "int4"
    layout = (np.uint8, np.float16, 2)
    is_tileable = True

    def rows(self) -> jax.Array:
        codes, scale = unpack(self.values, self.scale.shape[-1]), self.scale[..., None].astype(jnp.float32)
        weights = decode(codes, scale, *(None if x is None else x[..., None] for x in (self.zero, self.minimum)))
        rows = weights.reshape(*weights.shape[:-2], -1)[..., : self.width]
        return rows if self.x_scale is None else rows * self.x_scale

    def check(self) -> None:
        super().check()
        require(self.x_bits in (8, 16), f"x_bits = {self.x_bits!r} is neither 8 nor 16")
        require(self.zero is None or self.minimum is None, "zero and minimum both")
        for name, dtype in (("zero", np.uint8), ("minimum", np.float16)):
            array = getattr(self, name)
            if array is not None:
                check_array(name, array, (dtype,))
                shapes = f"{name} {list(array.shape)} is not of the shape of scale {list(self.scale.shape)}"
                require(array.shape == self.scale.shape, shapes)
        if self.x_scale is not None:
            check_array("x_scale", self.x_scale, (np.float16, ml_dtypes.bfloat16, np.float32))
            expected = (*self.values.shape[:-2], 1, self.columns)
            require(self.x_scale.shape == expected, f"x_scale {list(self.x_scale.shape)} is not {list(expected)}")

    def native(self) -> native.Rows | None:
        groups = self.scale.shape[-1]
        if not native.fits(self.values.shape[-1] // groups, groups):
            return None
        return native.Rows("int4", self.values, self.scale, self.minimum, self.zero, x_bits=self.x_bits)

    def take(self, index: jax.Array) -> jax.Array:
        if self.x_scale is None:
            return super().take(index)
        return self.replace(x_scale=None).take(index) * self.x_scale[0]

    def axes(self, names: Sequence[str | None]) -> PyTree:
        leaf = super().axes(names)
        along = names[-1] if self.is_table else names[-2]
        return leaf if self.x_scale is None else leaf.replace(x_scale=Axes((*names[:-2], None, along)))


def decode(
    codes: jax.Array, scale: jax.Array, zero: jax.Array | None = None, minimum: jax.Array | None = None
) -> jax.Array:
    """Dequantize codes by the formula of `Int4`; the arrays broadcast."""
    codes = codes.astype(jnp.float32)
    if minimum is not None:
        return codes * scale + minimum.astype(jnp.float32)
    return (codes - (8.0 if zero is None else zero.astype(jnp.float32))) * scale


def scales(groups: jax.Array, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """Compute `(scale, zero)`, each `[...]`, of groups of weights `[..., group]`; a symmetric zero is None.

    A symmetric scale is amax / 7.5, as in compressed-tensors, torchao and qwix. An asymmetric scale spans the weights
    and 0 with 15 steps.
    """
    if symmetric:
        return _representable(jnp.max(jnp.abs(groups), -1) / 7.5), None
    low, high = jnp.minimum(jnp.min(groups, -1), 0), jnp.maximum(jnp.max(groups, -1), 0)
    scale = _representable((high - low) / 15)
    zero = jnp.clip(jnp.round(-low / jnp.where(scale > 0, scale, 1)), 0, 15)
    return scale, zero.astype(jnp.uint8)


def _representable(scale):
    """The scale rounded to float16, as it is stored, for weights to be divided by."""
    return scale.astype(jnp.float16).astype(jnp.float32)


def encode(weights: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
    """Round weights to the nearest codes, half to even; `scale` and `zero` broadcast against `weights`."""
    offset = 8.0 if zero is None else zero.astype(jnp.float32)
    return jnp.clip(jnp.round(weights / jnp.where(scale > 0, scale, 1)) + offset, 0, 15)


def nearest(rows: jax.Array, group: int, symmetric: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantize rows `[..., k]` by rounding to nearest: `(codes [..., g, group], scale, zero)`, as `scales`."""
    groups = into_groups(rows.astype(jnp.float32), group)
    scale, zero = scales(groups, symmetric)
    return encode(groups, scale[..., None], None if zero is None else zero[..., None]), scale, zero


@register("quant", "int4")
@dataclasses.dataclass(frozen=True)
class Int4Form(Form):
    """int4: groups of `group` inputs share a scale, and a zero point where they are not `symmetric`.

    Args:
      method: `rtn` rounds to nearest; `gptq` and `awq` are calibrated on text.
      activations: `float`, or `int8`: the native product may then round activations to 8 bits, scaled by a group's
        largest, as llama.cpp does. This is faster on CPUs and has no effect elsewhere.
      embedding: the form of embeddings and the head.
    """

    method: str = "rtn"
    group: int = 32
    symmetric: bool = True
    activations: str = "float"
    embedding: str = "int8"

    leaf_type = Int4

    def __post_init__(self):
        for field, allowed in (("method", METHODS), ("activations", ("float", "int8"))):
            if (value := getattr(self, field)) not in allowed:
                hint = did_you_mean(value, allowed)
                raise UserError(f"quant int4: {field} = {value!r} is none of {', '.join(allowed)}{hint}")
        if self.group < 32 or self.group & (self.group - 1):
            raise UserError(f"quant int4: group = {self.group} must be a power of two and at least 32")

    @property
    def calibrated(self) -> bool:
        return self.method != "rtn"

    def leaf(self, rows: jax.Array, is_table: bool) -> Int4:
        return self.make(*nearest(rows, self.group, self.symmetric), rows.shape[-1], is_table)

    def make(
        self,
        codes: jax.Array,
        scale: jax.Array,
        zero: jax.Array | None,
        columns: int,
        is_table: bool = False,
        x_scale: jax.Array | None = None,
    ) -> Int4:
        """Pack codes `[..., g, group]` into a leaf with their scales and zero points `[..., g]`."""
        bits = 8 if self.activations == "int8" else 16
        return Int4(pack(codes), scale.astype(jnp.float16), zero, None, x_scale, columns, bits, is_table)
