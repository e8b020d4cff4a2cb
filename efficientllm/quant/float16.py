"""Sixteen-bit floats, and no change at all."""

import dataclasses
import functools
import typing

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from efficientllm.errors import UserError
from efficientllm.ops import native
from efficientllm.quant import matmul
from efficientllm.quant.base import STATIC, Form, Rows
from efficientllm.quant.consistency import check_array
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice


@flax.struct.dataclass
class Half(Rows):
    """Rows in bfloat16 or float16: 16 bits a weight."""

    values: typing.Any
    is_table: bool = flax.struct.field(default=False, **STATIC)

    @property
    def name(self):
        return self.values.dtype.name

    def check(self):
        super().check()
        check_array("values", self.values, (np.float16, ml_dtypes.bfloat16))

    def as_input_sharded(self, shards):
        return self

    def rows(self):
        return self.values.astype(jnp.float32)

    def take(self, index):
        if kernel_choice.platform() != "cpu":
            return super().take(index)
        # XLA's CPU compiler looks bfloat16 up in a float32 copy of the table, and would make it whole ahead of a loop.
        index, values = jax.lax.optimization_barrier((index, self.values))
        return jnp.take(values, index, axis=0).astype(jnp.float32)

    def dequantize_after(self, x):
        """On accelerators products read it as it lies; tied to `x`, a program would copy every kernel first."""
        if kernel_choice.platform() == "cpu":
            return super().dequantize_after(x)
        return self if self.values.dtype == x.dtype else self.behind(x)

    def product(self, x_MK, operand):
        if kernel_choice.platform() == "cpu":
            return super().product(x_MK, operand)
        return matmul.contract(x_MK.astype(operand), self.dequantize_after(x_MK).values.astype(operand))

    def native(self):
        return native.Rows(self.name, self.values) if self.width % 2 == 0 else None


@dataclasses.dataclass(frozen=True)
class HalfForm(Form):
    dtype: str

    leaf_type = Half

    @property
    def embedding(self):
        """The form of embeddings and heads."""
        return self.dtype

    def leaf(self, rows, is_table):
        return Half(rows.astype(self.dtype), is_table)


@register("quant", "float32")
@dataclasses.dataclass(frozen=True)
class Float32Form(Form):
    """Arrays as they are."""

    leaf_type = None
    embedding: typing.ClassVar[str] = "float32"


@register("quant", "stored")
@dataclasses.dataclass(frozen=True)
class AsStoredForm(Form):
    """The rounded weights of a checkpoint (AWQ, GPTQ, GGUF) as its files hold them, at inference."""

    leaf_type = Rows
    embedding: typing.ClassVar[str] = "float32"

    def leaf(self, rows, is_table):
        raise UserError(
            "config.quant = 'stored' takes what a checkpoint's files hold, at inference; here take 'float32'"
        )


register("quant", "bfloat16")(functools.partial(HalfForm, "bfloat16"))
register("quant", "float16")(functools.partial(HalfForm, "float16"))
