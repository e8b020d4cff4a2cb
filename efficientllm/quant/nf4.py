"""NF4: 4-bit NormalFloat weights (Dettmers et al. 2023, arXiv:2305.14314, Section 3 and Appendix E)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import UserError
from efficientllm.ops import native
from efficientllm.quant.base import STATIC, Form, GroupedRows, into_groups, pack, unpack
from efficientllm.registry import register

# Quantiles of a normal distribution, scaled to -1..1, with an exact zero: the table of QLoRA and bitsandbytes.
TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@flax.struct.dataclass
class NF4(GroupedRows):
    """NF4 rows `TABLE[code] * scale`: codes of `base.pack` `[..., r, k / 2]`, and float32 `[..., r, g]`."""

    values: jax.Array
    scale: jax.Array
    columns: int = flax.struct.field(**STATIC)
    is_table: bool = flax.struct.field(default=False, **STATIC)

    name = "nf4"
    layout = (np.uint8, np.float32, 2)

    def rows(self) -> jax.Array:
        weights = jnp.asarray(TABLE)[unpack(self.values, self.scale.shape[-1])] * self.scale[..., None]
        return weights.reshape(*weights.shape[:-2], -1)[..., : self.width]

    def native(self) -> native.Rows | None:
        groups = self.scale.shape[-1]
        if not native.fits(self.values.shape[-1] // groups, groups):
            return None
        return native.Rows("nf4", self.values, self.scale, table=jnp.asarray(TABLE))


@register("quant", "nf4")
@dataclasses.dataclass(frozen=True)
class NF4Form(Form):
    """NF4: the nearest of 16 values, scaled by the largest absolute weight of `block`.

    Blocks run along the inputs of each output. They are those of bitsandbytes where `block` divides the inputs.
    """

    block: int = 64
    embedding: str = "int8"

    leaf_type = NF4

    def __post_init__(self):
        if self.block < 32 or self.block & (self.block - 1):
            raise UserError(f"quant nf4: block = {self.block} must be a power of two and at least 32")

    def leaf(self, rows: jax.Array, is_table: bool) -> NF4:
        columns = rows.shape[-1]
        rows = into_groups(rows.astype(jnp.float32), self.block)
        scale = jnp.max(jnp.abs(rows), -1)
        normal = rows / jnp.where(scale > 0, scale, 1)[..., None]
        codes = jnp.searchsorted(jnp.asarray((TABLE[1:] + TABLE[:-1]) / 2), normal, side="left")
        return NF4(pack(codes), scale, columns, is_table)
