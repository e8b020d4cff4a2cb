"""int8 weights with a scale for each output or each group."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import UserError
from efficientllm.ops import native
from efficientllm.quant import matmul
from efficientllm.quant.base import STATIC, Form, GroupedRows, into_groups
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice


@flax.struct.dataclass
class Int8(GroupedRows):
    """int8 rows `values * scale`: int8 `[..., r, k]`, padded to whole groups, and float32 `[..., r, g]`."""

    values: jax.Array
    scale: jax.Array
    columns: int = flax.struct.field(**STATIC)
    is_table: bool = flax.struct.field(default=False, **STATIC)

    name = "int8"
    layout = (np.int8, np.float32, 1)

    def rows(self) -> jax.Array:
        codes = self.values.reshape(*self.scale.shape, -1).astype(jnp.float32)
        return (codes * self.scale[..., None]).reshape(self.values.shape)[..., : self.width]

    def native(self) -> native.Rows | None:
        width, groups = self.values.shape[-1], self.scale.shape[-1]
        if width % 4 or not native.fits(width // groups, groups):
            return None
        return native.Rows("int8", self.values, self.scale)

    def product(self, x_mk: jax.Array, operand: jax.typing.DTypeLike) -> jax.Array:
        if self.scale.shape[-1] > 1:
            return super().product(x_mk, operand)
        # 16-bit floats represent the codes exactly. Compilers for accelerators fuse the conversion into the product;
        # codes that are tied to x, or scaled, would be written to memory first.
        leaf = self.dequantize_after(x_mk) if kernel_choice.platform() == "cpu" else self.behind(x_mk)
        return matmul.contract(x_mk.astype(operand), leaf.values.astype(operand)) * leaf.scale[:, 0]


@register("quant", "int8")
@dataclasses.dataclass(frozen=True)
class Int8Form(Form):
    """int8, symmetric, rounded to nearest: scale = amax / 127 of `group` weights; 0 is one group for each output."""

    group: int = 0
    embedding: str = "int8"

    leaf_type = Int8

    def __post_init__(self):
        if self.group < 0 or self.group % 32:
            raise UserError(f"quant int8: group = {self.group} must be 0 (whole columns) or a multiple of 32")

    def leaf(self, rows: jax.Array, is_table: bool) -> Int8:
        columns = rows.shape[-1]
        rows = into_groups(rows.astype(jnp.float32), self.group or columns)
        scale = jnp.max(jnp.abs(rows), -1) / 127
        codes = jnp.round(rows / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8)
        return Int8(codes.reshape(*rows.shape[:-2], -1), scale, columns, is_table)
