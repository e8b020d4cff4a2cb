"""bfloat16 and float16 weights, unquantized float32, and the weights of a quantized checkpoint as stored."""

import dataclasses
import functools
import typing

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from efficientllm.errors import FieldError
from efficientllm.ops import native
from efficientllm.ops.native import matmul as native_matmul
from efficientllm.quant import matmul
from efficientllm.quant.base import STATIC, Form, Rows
from efficientllm.quant.consistency import check_array
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice


@flax.struct.dataclass
class Half(Rows):
    """bfloat16 or float16 rows `[..., r, k]`: 16 bits a weight."""

    values: jax.Array
    is_table: bool = flax.struct.field(default=False, **STATIC)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.values.dtype.name

    def check(self) -> None:
        super().check()
        check_array("values", self.values, (np.float16, ml_dtypes.bfloat16))

    def as_input_sharded(self, shards: int) -> "Half":
        return self

    def rows(self) -> jax.Array:
        return self.values.astype(jnp.float32)

    def take(self, index: jax.Array) -> jax.Array:
        if kernel_choice.platform() != "cpu":
            return super().take(index)
        # XLA's CPU compiler looks bfloat16 up in a float32 copy of the table, and would hoist the copy out of a loop.
        index, values = jax.lax.optimization_barrier((index, self.values))
        return jnp.take(values, index, axis=0).astype(jnp.float32)

    def dequantize_after(self, x: jax.Array) -> typing.Self:
        """Tie this leaf to `x` on CPUs alone: accelerators multiply it as it is, and a tie would copy every kernel."""
        if kernel_choice.platform() == "cpu":
            return super().dequantize_after(x)
        return self if self.values.dtype == x.dtype else self.behind(x)

    def product(self, x_mk: jax.Array, operand: jax.typing.DTypeLike) -> jax.Array:
        if kernel_choice.platform() == "cpu":
            return super().product(x_mk, operand)
        return matmul.contract(x_mk.astype(operand), self.dequantize_after(x_mk).values.astype(operand))

    def operand_rows(self, x: jax.Array, operand: jax.typing.DTypeLike) -> jax.Array:
        if self.values.dtype == operand and native_matmul.is_usable(operand):
            return self.values  # no conversion that XLA could hoist; a tie copies them
        return super().operand_rows(x, operand)

    def stored_rows(self) -> jax.Array:
        return self.values

    def native(self) -> native.Rows | None:
        return native.Rows(self.name, self.values) if self.width % 2 == 0 else None


@dataclasses.dataclass(frozen=True)
class HalfForm(Form):
    """Rounding to bfloat16 or float16."""

    dtype: str

    leaf_type = Half

    @property
    def embedding(self) -> str:
        """The form of embeddings and the head."""
        return self.dtype

    def leaf(self, rows: jax.Array, is_table: bool) -> Half:
        return Half(rows.astype(self.dtype), is_table)


@register("quant", "float32")
@dataclasses.dataclass(frozen=True)
class Float32Form(Form):
    """float32 arrays, not quantized."""

    leaf_type = None
    embedding: typing.ClassVar[str] = "float32"


@register("quant", "stored")
@dataclasses.dataclass(frozen=True)
class AsStoredForm(Form):
    """Quantized weights of a checkpoint (AWQ, GPTQ, GGUF) as its files store them, at inference."""

    leaf_type = Rows
    embedding: typing.ClassVar[str] = "float32"

    def leaf(self, rows: jax.Array, is_table: bool) -> Rows:
        raise FieldError(
            "quant", "takes what a checkpoint's files hold, at inference; here take 'float32'", value="stored"
        )


register("quant", "bfloat16")(functools.partial(HalfForm, "bfloat16"))
register("quant", "float16")(functools.partial(HalfForm, "float16"))
