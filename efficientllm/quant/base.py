"""Base classes of quantized weights: a form makes leaves, which hold rows `[..., R, K]`.

A row is the weights of one output or one entry, and lies as a product of few vectors reads it. `is_table` says what
they stand for: a table `[..., R, K]`, whose rows are looked up, or the kernel `[..., K, R]`; a tied head is the table's
arrays under the other reading.
"""

import typing

import jax
import jax.numpy as jnp

from efficientllm.quant import consistency
from efficientllm.quant import matmul as products
from efficientllm.weights import Axes, Weight

STATIC = {"pytree_node": False}


class Form:
    """The form of rounded weights: subclasses are frozen dataclasses registered as ("quant", name).

    They have a field or a property `embedding`, the spec of the form of tables.
    """

    # The class of the leaves that `leaf` makes, by whose name they are written to files and read; None rounds nothing.
    leaf_type: typing.ClassVar[typing.Any]

    @property
    def calibrated(self) -> bool:
        """Whether leaves are made with text (`calibrate`); `leaf` then makes none."""
        return False

    def leaf(self, rows: jax.Array, is_table: bool) -> "Rows":
        """The leaf of float32 rows `[..., R, K]`, the weights of one output each; `is_table` as in `Rows`."""
        raise NotImplementedError(f"{type(self).__name__} defines no leaf(rows, is_table)")


def rounds(form: Form | None) -> bool:
    """Whether a form makes leaves; None, that of a parameter that has none, does not."""
    return form is not None and form.leaf_type is not None


class Rows(Weight):
    """Subclasses have arrays whose last two axes are R and one along K, `is_table`, `name` and these three methods."""

    name: typing.ClassVar[str | None] = None
    by_group = True
    is_tileable = False  # whether `pallas_int4` multiplies with its rows
    x_scale = None  # `[1, K]`: what the activations are multiplied by

    def rows(self):
        """float32 `[..., R, K]`."""
        raise NotImplementedError(type(self).__name__)

    @property
    def width(self):
        """K."""
        return self.values.shape[-1]

    def native(self):
        """The rows as `efficientllm.ops.native` multiplies them; None where it has no such product."""
        return None

    def product(self, x_MK, operand):
        """float32 `x @ rows.T` through XLA, of operands rounded to `operand`."""
        return products.contract(x_MK.astype(operand), self.dequantize_after(x_MK).rows().astype(operand))

    @property
    def shape(self):
        *stack, R, _ = self.values.shape
        return (*stack, R, self.width) if self.is_table else (*stack, self.width, R)

    @property
    def ndim(self):
        return len(self.shape)

    def dense(self):
        rows = self.rows()
        return rows if self.is_table else jnp.swapaxes(rows, -1, -2)

    def take(self, index):
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0), self).rows()

    @property
    def T(self):
        return self.replace(is_table=not self.is_table)

    def behind(self, x):
        """The same leaf, not to be converted ahead of a loop in which `x` is made."""
        return jax.lax.optimization_barrier((x, self))[1]

    def dequantize_after(self, x):
        """The same leaf, to be decompressed once `x` is known and not before; NaN if its first number is.

        XLA would else decompress all weights ahead of a loop, or of the first layer, and keep them so. The barrier
        stops the first, but is gone when buffers are assigned.
        """
        x, leaf = jax.lax.optimization_barrier((x, self))
        first = x[(0,) * x.ndim]

        def tie(array):
            if not jnp.issubdtype(array.dtype, jnp.floating):
                return jnp.where(first == first, array, 0)
            # As integers, of which all ones are a NaN: XLA selects 16-bit floats as float32 on CPUs.
            bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
            tied = jnp.where(first == first, bits, bits.dtype.type(jnp.iinfo(bits.dtype).max))
            return jax.lax.bitcast_convert_type(tied, array.dtype)

        return jax.tree.map(tie, leaf)

    def check(self) -> None:
        """Raises UserError where arrays read from a file do not fit each other; reads their shapes and dtypes alone."""
        consistency.check_flag(self)

    def apply(self, x, product, of_rows):
        return product(x, self.dequantize_after(x).dense())

    def matmul(self, x, precision, out_dtype, axes=None):
        if self.is_table or self.ndim > 2:
            return super().matmul(x, precision, out_dtype, axes)
        return products.product(x, self, precision, out_dtype, axes)

    def has_vector_product(self, rows):
        return products.is_native(rows)

    def has_tiled_product(self):
        return products.is_tiled(self)

    def together(self, x, others, precision):
        leaves = (self, *others)
        if any(leaf.is_table or leaf.ndim > 2 for leaf in leaves):
            return None
        return products.together(x, leaves, precision)

    def axes(self, names):
        *stack, first, second = names
        row, along = (first, second) if self.is_table else (second, first)
        return jax.tree.map(lambda array: Axes((*stack, row, along)), self)


class GroupedRows(Rows):
    """Rows in groups that share a scale: subclasses have `scale` `[..., R, G]`, and `columns`, which is K.

    The last group may be filled up, and a value may be two codes (`pack`).
    """

    # (dtype of values, dtype of scale, codes in a value)
    layout: typing.ClassVar[tuple]

    def check(self):
        super().check()
        consistency.check_groups(self, *self.layout)

    @property
    def width(self):
        return self.columns

    def can_shard_inputs(self, shards):
        """Whether so many parts of the inputs are of whole groups, or of the one group that an output has."""
        size, groups = self.values.shape[-1], self.scale.shape[-1]
        full = self.columns in (size, 2 * size)
        between = groups % shards == 0 or (groups == 1 and size == self.columns and size % shards == 0)
        return shards == 1 or (full and between)

    def as_input_sharded(self, shards):
        """As wide as a part of the inputs."""
        return self.replace(columns=self.columns // shards) if self.can_shard_inputs(shards) else self.dense()


def into_groups(rows, group):
    """`[..., K]` -> `[..., G, group]`, padded with zeros to whole groups."""
    K = rows.shape[-1]
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -K % group)])
    return padded.reshape(*rows.shape[:-1], -1, group)


def pack(codes):
    """Codes 0..15, `[..., G, group]`, to bytes `[..., G * group / 2]`: one of a group's first half, with one of its
    second half in the upper bits."""
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
    return (low | high << 4).reshape(*codes.shape[:-2], -1)


def unpack(values, groups):
    """The codes `[..., groups, group]` of `pack`'s bytes, as one elementwise operation."""
    bytes_ = values.reshape(*values.shape[:-1], groups, 1, -1)
    codes = bytes_ >> jnp.array([[0], [4]], jnp.uint8) & 15
    return codes.reshape(*values.shape[:-1], groups, -1)
