"""Base classes of quantized weights: a form makes leaves, which hold rows `[..., r, k]`.

A row is the weights of one output or one table entry, contiguous as a product with few vectors reads it. `is_table`
says what the rows represent: a table `[..., r, k]`, or a kernel `[..., k, r]`. A tied head has the table's arrays, with
`is_table` False.
"""

import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from efficientllm.ops import native
from efficientllm.quant import consistency
from efficientllm.quant import matmul as products
from efficientllm.typing import PyTree
from efficientllm.weights import Axes, Precision, Weight

STATIC = {"pytree_node": False}


class Form:
    """Form of quantized weights; subclasses are frozen dataclasses registered as ("quant", name).

    A subclass has a field or a property `embedding`, the spec of the form of tables. It is not declared here: the
    registry reads every annotation as a parameter of the spec.
    """

    # The class of the leaves that `leaf` makes, whose name identifies them in files; None where nothing is quantized.
    leaf_type: typing.ClassVar[typing.Any]

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` makes the leaves, from text, instead of `leaf`."""
        return False

    def leaf(self, rows: jax.Array, is_table: bool) -> "Rows":
        """Quantize float32 rows `[..., r, k]` to a leaf; `is_table` as in `Rows`."""
        raise NotImplementedError(f"{type(self).__name__} defines no leaf(rows, is_table)")


def rounds(form: Form | None) -> bool:
    """Whether a form quantizes; a parameter without a form (None) and `float32` stay as they are."""
    return form is not None and form.leaf_type is not None


class Rows(Weight):
    """Quantized leaf: rows `[..., r, k]` that stand for a kernel or a table.

    Subclasses are flax struct dataclasses. They have arrays, whose last two axes are r and an axis along k, a field
    `is_table`, and `rows`.
    """

    values: jax.Array
    is_table: bool
    replace: typing.ClassVar[Callable[..., typing.Any]]  # flax.struct adds it

    name: typing.ClassVar[str | None] = None
    by_group = True
    is_tileable = False  # whether `pallas_int4` multiplies by its rows
    x_scale = None  # `[1, k]`: factors of the activations

    def rows(self) -> jax.Array:
        """Dequantize to float32 `[..., r, k]`."""
        raise NotImplementedError(type(self).__name__)

    @property
    def width(self) -> int:
        """The number of inputs of a row, k."""
        return self.values.shape[-1]

    def native(self) -> native.Rows | None:
        """Describe the rows to the C++ product of `efficientllm.ops.native`; None where it cannot multiply them."""
        return None

    def product(self, x_mk: jax.Array, operand: jax.typing.DTypeLike) -> jax.Array:
        """Compute float32 `x @ rows.T` `[m, r]` through XLA, of operands rounded to the dtype `operand`."""
        return products.contract(x_mk.astype(operand), self.operand_rows(x_mk, operand))

    def operand_rows(self, x: jax.Array, operand: jax.typing.DTypeLike) -> jax.Array:
        """Dequantize `[..., r, k]`, rounded to the dtype `operand`, for a product with `x`."""
        return self.dequantize_after(x).rows().astype(operand)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, count, _ = self.values.shape
        return (*stack, count, self.width) if self.is_table else (*stack, self.width, count)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> jax.Array:
        rows = self.rows()
        return rows if self.is_table else jnp.swapaxes(rows, -1, -2)

    def take(self, index: jax.Array) -> jax.Array:
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0), self).rows()

    @property
    def T(self) -> "Rows":
        return self.replace(is_table=not self.is_table)

    def behind(self, x: jax.Array) -> typing.Self:
        """Return this leaf behind an optimization barrier, so that XLA cannot convert it ahead of the loop of `x`."""
        return jax.lax.optimization_barrier((x, self))[1]

    def dequantize_after(self, x: jax.Array) -> typing.Self:
        """Tie this leaf to `x`, so that XLA dequantizes it after `x` is known; NaN if the first number of `x` is.

        XLA would otherwise dequantize all weights ahead of a loop, or of the first layer, and hold them in memory. The
        barrier prevents the hoisting out of loops, but is gone when buffers are assigned: hence the select.
        """
        x, leaf = jax.lax.optimization_barrier((x, self))
        first = x[(0,) * x.ndim]

        def tie(array):
            if not jnp.issubdtype(array.dtype, jnp.floating):
                return jnp.where(first == first, array, 0)
            # Select integers, of which all ones are a NaN: on CPUs XLA selects 16-bit floats as float32.
            bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
            tied = jnp.where(first == first, bits, bits.dtype.type(jnp.iinfo(bits.dtype).max))
            return jax.lax.bitcast_convert_type(tied, array.dtype)

        return jax.tree.map(tie, leaf)

    def check(self) -> None:
        """Raise UserError where arrays read from a file do not fit each other, by their shapes and dtypes."""
        consistency.check_flag(self)

    def apply(self, x: jax.Array, product: Callable[..., jax.Array], of_rows: Callable[..., jax.Array]) -> jax.Array:
        return product(x, self.dequantize_after(x).dense())

    def matmul(
        self,
        x: jax.Array,
        precision: Precision,
        out_dtype: jax.typing.DTypeLike | None,
        axes: Sequence[str | None] | None = None,
    ) -> jax.Array:
        if self.is_table or self.ndim > 2:
            return super().matmul(x, precision, out_dtype, axes)
        return products.product(x, self, precision, out_dtype, axes)

    def has_vector_product(self, rows: int) -> bool:
        return products.is_native(rows)

    def has_tiled_product(self) -> bool:
        return products.is_tiled(self)

    def together(self, x: jax.Array, others: Sequence["Rows"], precision: Precision) -> list[jax.Array] | None:
        leaves = (self, *others)
        if any(leaf.is_table or leaf.ndim > 2 for leaf in leaves):
            return None
        return products.together(x, leaves, precision)

    def axes(self, names: Sequence[str | None]) -> PyTree:
        *stack, first, second = names
        row, along = (first, second) if self.is_table else (second, first)
        return jax.tree.map(lambda array: Axes((*stack, row, along)), self)


class GroupedRows(Rows):
    """Quantized rows with a scale for each group of inputs.

    Subclasses have `scale` `[..., r, g]` and `columns`, which is k: `values` are padded to whole groups. A value may
    hold two codes (`pack`).
    """

    scale: jax.Array
    columns: int
    # (dtype of values, dtype of scale, codes in a value)
    layout: typing.ClassVar[tuple[typing.Any, typing.Any, int]]

    def check(self) -> None:
        super().check()
        consistency.check_groups(self, *self.layout)

    @property
    def width(self) -> int:
        return self.columns

    def can_shard_inputs(self, shards: int) -> bool:
        """Whether each of `shards` shards of the inputs has whole groups, or lies in an output's only group."""
        size, groups = self.values.shape[-1], self.scale.shape[-1]
        full = self.columns in (size, 2 * size)
        between = groups % shards == 0 or (groups == 1 and size == self.columns and size % shards == 0)
        return shards == 1 or (full and between)

    def as_input_sharded(self, shards: int) -> "Rows | jax.Array":
        """Set `columns` to the width of one shard of the inputs; dequantize where the inputs cannot be sharded."""
        return self.replace(columns=self.columns // shards) if self.can_shard_inputs(shards) else self.dense()


def into_groups(rows: jax.Array, group: int) -> jax.Array:
    """Reshape rows `[..., k]` to groups `[..., g, group]`, padded with zeros to whole groups."""
    width = rows.shape[-1]
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -width % group)])
    return padded.reshape(*rows.shape[:-1], -1, group)


def pack(codes: jax.Array) -> jax.Array:
    """Pack codes 0..15 `[..., g, group]`, two a byte, to uint8 `[..., g * group / 2]`.

    The lower four bits hold a code of the group's first half, the upper four the code of its second half.
    """
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
    return (low | high << 4).reshape(*codes.shape[:-2], -1)


def unpack(values: jax.Array, groups: int) -> jax.Array:
    """Unpack the bytes of `pack` to codes `[..., groups, group]`, as one elementwise operation."""
    bytes_ = values.reshape(*values.shape[:-1], groups, 1, -1)
    codes = bytes_ >> jnp.array([[0], [4]], jnp.uint8) & 15
    return codes.reshape(*values.shape[:-1], groups, -1)
