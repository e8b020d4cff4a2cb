"""Weights, arrays or packed leaves, and their products: every matrix product of the package goes through `matmul`.

Kernels are `[..., in, out]`, so that adapters, quantisers and name tables see one layout. A kernel is an array, or a
`Weight`: a leaf that holds arrays of its own.
"""

import dataclasses
import functools
import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import matrix_product
from efficientllm.registry import build, register
from efficientllm.runtime import cpuinfo, kernel_choice
from efficientllm.typing import AxisNames, Params, PyTree


def path_of(keys: tuple) -> str:
    """Joins a key path of a parameter tree: `groups/block_0/mixer/q/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Precision policy over float32 parameters: the dtype of activations, and of both operands of a matrix product.

    Products accumulate in float32 everywhere. Softmax, norms, routers, rotary angles and the loss are float32 under
    every policy; in training on GPUs the loss reads logits that are stored in the dtype of activations.
    """

    activation: jnp.dtype
    product: jnp.dtype

    def __post_init__(self):
        for field in ("activation", "product"):
            object.__setattr__(self, field, jnp.dtype(getattr(self, field)))

    @classmethod
    def of(cls, spec: "str | Precision") -> "Precision":
        """Returns the policy that a spec names, or the policy itself. Raises UserError for a spec that names none."""
        return spec if isinstance(spec, cls) else _named(spec)


_F32, _BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
FLOAT32 = Precision(_F32, _F32)
register("precision", "float32")(functools.partial(Precision, _F32, _F32))
register("precision", "bfloat16")(functools.partial(Precision, _BF16, _BF16))
# bfloat16 operands with float32 results in both passes: what CPUs with bfloat16 dot products run fastest, and the only
# bfloat16 product they run natively.
register("precision", "mixed")(functools.partial(Precision, _F32, _BF16))


@functools.cache
def _named(spec):
    return build("precision", spec, where="precision")


AUTO = "auto"  # a value of config.model.precision


class PrecisionChoice(typing.NamedTuple):
    """The policy that AUTO stands for, and why."""

    chosen: str
    reason: str


def choose_precision() -> PrecisionChoice:
    """Chooses a policy for the platform being compiled for: 16-bit operands where it has instructions for them.

    A CPU with products of bfloat16 gets "mixed", whose activations and KV cache are float32: SmolLM2-135M's logits are
    off by 0.037 on average, those of transformers in bfloat16 by 0.076, and prefill in int8 and int4 takes 5 to 7 %
    longer than under "bfloat16" (AMD EPYC, Zen 4, 2 cores, 2026-11-30).
    """
    platform = kernel_choice.platform()
    if platform == "cpu":
        if instructions := cpuinfo.bfloat16_instructions():
            return PrecisionChoice("mixed", f"the CPU reports {instructions}")
        return PrecisionChoice("float32", "the CPU reports no instructions for products of bfloat16")
    if platform == "gpu" and (0, 0) < kernel_choice.capability() < (8, 0):
        return PrecisionChoice("float32", "GPUs of a compute capability below 8.0 have no products of bfloat16")
    return PrecisionChoice("bfloat16", f"a {platform.upper()} has products of bfloat16")


def activation_dtype(precision: str | Precision) -> jnp.dtype:
    """Returns the dtype of activations under a policy, or under the one that a spec names."""
    return Precision.of(precision).activation


class Weight:
    """Base class of leaves in place of a kernel or a table: an adapter around it, or a quantized form of it.

    Subclasses are flax struct dataclasses. They are trees of arrays, and are scanned, sharded, saved and mapped as
    such. Their arrays have the leading axes (layers, experts) of the kernel. Their `shape` is the kernel's. `by_group`
    is True for those that grouped products accept, one of a stack of kernels at a time.
    """

    by_group: typing.ClassVar[bool] = False

    def apply(self, x: jax.Array, product: typing.Callable, of_rows: typing.Callable) -> jax.Array:
        """Multiplies `x` with the kernel, or each row of `x` with its kernel of a stack.

        `product(x, kernel)` is the caller's product, dense or by groups; `of_rows(v)` gathers for each row of `x` its
        kernel's vector of `v` `[..., out]`.
        """
        return product(x, self.dense())

    def matmul(
        self, x: jax.Array, precision: Precision, out_dtype: jnp.dtype | None, axes: AxisNames | None = None
    ) -> jax.Array:
        """Computes `x[..., in] @ self[in, out]`; overridden by forms with a specialized product. See `matmul`."""
        return self.apply(x, lambda x, w: matmul(x, w, precision, out_dtype, axes), lambda v: v)

    def has_vector_product(self, rows: int) -> bool:
        """Tells whether `matmul` with so few rows of x is one native call that dequantizes nothing ahead."""
        return False

    def has_tiled_product(self) -> bool:
        """Tells whether `matmul` dequantizes tile by tile in a Pallas kernel, on the one device that traces this."""
        return False

    def together(self, x: jax.Array, others: list, precision: Precision) -> list | None:
        """Multiplies `x` with this kernel and with `others`, leaves of this type, in one call; None if it cannot."""
        return None

    def dense(self) -> jax.Array:
        """Returns the kernel as one float32 array."""
        raise NotImplementedError(type(self).__name__)

    def adapted_bias(self, bias: jax.Array) -> jax.Array:
        """Returns what is added to products with this kernel, `[..., out]`, where its layer has the bias `bias`."""
        return bias

    def stored_rows(self) -> jax.Array | None:
        """Returns the transposed kernel `[out, in]` as it is stored, where that is one array of floats; else None."""
        return None

    def dequantize_after(self, x: jax.Array) -> "Weight":
        """Ties this leaf to `x`, so that XLA cannot hoist its dequantization out of the loop that makes `x`."""
        return self

    def axes(self, names: AxisNames) -> "Weight":
        """Returns this leaf with the logical axes of each array in its place, for a kernel with the axes `names`."""
        raise NotImplementedError(type(self).__name__)

    def can_shard_inputs(self, shards: int) -> bool:
        """Tells whether the kernel's input dimension can be split into so many shards without dequantizing it."""
        return True

    def as_input_sharded(self, shards: int) -> "jax.Array | Weight":
        """Returns a form whose arrays can be sharded over the kernel's input dimension; dense where this cannot be."""
        return self.dense()

    def take(self, index: jax.Array) -> jax.Array:
        """Looks up the rows `index` of a table `[rows, width]`, float32."""
        return jnp.take(self.dense(), index, axis=0)

    @property
    def T(self) -> "jax.Array | Weight":
        """The transposed kernel."""
        return self.dense().T


@flax.struct.dataclass
class TransposedKernel(Weight):
    """Transposed table: `[out, in]` in place of the kernel `[in, out]`, the embedding as the head of a tied model.

    CPUs multiply it without a transpose. XLA would transpose it for a product in a loop, and its gradient back: four
    passes over the table.
    """

    table: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape[::-1]

    def matmul(
        self, x: jax.Array, precision: Precision, out_dtype: jnp.dtype | None, axes: AxisNames | None = None
    ) -> jax.Array:
        return matrix_product.multiply(x, self.table, precision.product, jnp.dtype(out_dtype or x.dtype), True)

    def dense(self) -> jax.Array:
        return self.table.T

    def axes(self, names: AxisNames) -> "TransposedKernel":
        return TransposedKernel(Axes(names[::-1]))


def transposed_kernel(table: jax.Array | Weight) -> jax.Array | Weight:
    """Returns the kernel `[in, out]` of a table `[out, in]`."""
    return table.T if isinstance(table, Weight) else TransposedKernel(table)


def dense(w: jax.Array | Weight, after: jax.Array | None = None) -> jax.Array:
    """Returns a kernel of any form as an array; with `after`, XLA dequantizes it only once that array is computed."""
    if not isinstance(w, Weight):
        return w
    return w.dense() if after is None else w.dequantize_after(after).dense()


def adapted_bias(w: jax.Array | Weight, bias: jax.Array) -> jax.Array:
    """Returns the bias `[..., out]` of a layer as the form of its kernel makes it."""
    return w.adapted_bias(bias) if isinstance(w, Weight) else bias


def axes(w: jax.Array | Weight, names: AxisNames) -> "Axes | Weight":
    """Returns the logical axes of a kernel: `names`, or a Weight with the axes of each array in its place."""
    return w.axes(names) if isinstance(w, Weight) else Axes(names)


class Axes(tuple):
    """Logical axis names of one array: a leaf of trees, unlike other tuples."""


def can_shard_inputs(w: jax.Array | Weight, shards: int) -> bool:
    """Tells whether a kernel's input dimension can be split into so many shards without dequantizing it."""
    return not isinstance(w, Weight) or w.can_shard_inputs(shards)


def as_input_sharded(w: jax.Array | Weight, shards: int) -> jax.Array | Weight:
    """Returns the kernel in a form whose input dimension can be split into so many shards."""
    return w.as_input_sharded(shards) if isinstance(w, Weight) else w


def take(table: jax.Array | Weight, index: jax.Array) -> jax.Array:
    """Looks up rows of a table of any form: `table[index]`."""
    return table.take(index) if isinstance(table, Weight) else jnp.take(table, index, axis=0)


def box(leaf: jax.Array | Weight, names: AxisNames) -> PyTree:
    """Boxes a kernel with its logical axes `names`: an array, or each array of a Weight."""
    if not isinstance(leaf, Weight):
        return nn.LogicallyPartitioned(leaf, tuple(names))
    return jax.tree.map(box, leaf, leaf.axes(names), is_leaf=lambda axes: isinstance(axes, Axes))


def is_box(leaf: PyTree) -> bool:
    """Tells whether a leaf of a parameter tree is an array boxed with its logical axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def box_as(boxed: Params, params: Params) -> Params:
    """Boxes `params`, arrays and Weights, with the axes that the plain model's tree `boxed` has in their places."""
    return jax.tree.map(lambda plain, leaf: box(leaf, plain.names), boxed, params, is_leaf=is_box)


def resident_bytes(params: PyTree) -> int:
    """Counts the bytes of a tree's arrays, on devices and in a checkpoint."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def parameter(module: nn.Module, name: str, init: typing.Callable, shape: tuple[int, ...]) -> jax.Array | Weight:
    """Declares or reads a parameter that may be a `Weight`, whose arrays need not have the shapes that `init` makes."""
    value: typing.Any = module.get_variable("params", name)
    return value if isinstance(value, Weight) else module.param(name, init, shape)


def matmul(
    x: jax.Array,
    w: jax.Array | Weight,
    precision: Precision | str,
    out_dtype: jnp.dtype | None = None,
    axes: AxisNames | None = None,
) -> jax.Array:
    """Computes `x[..., in] @ w[in, out]` -> `[..., out]` in `x.dtype` (or `out_dtype`).

    `precision` is a policy, or a spec that names one. `axes` are the logical names of (in, out), by which Pallas
    kernels are sharded over a mesh.
    """
    precision = Precision.of(precision)
    if isinstance(w, Weight):
        return w.matmul(x, precision, out_dtype, axes)
    return matrix_product.multiply(x, w, precision.product, jnp.dtype(out_dtype or x.dtype))


def matmul_together(x: jax.Array, ws: list, precision: Precision | str) -> list | None:
    """Multiplies x with each of `ws` in one call; None where their form has no such product."""
    first, *others = ws
    alike = isinstance(first, Weight) and all(type(w) is type(first) for w in others)
    return first.together(x, others, Precision.of(precision)) if alike else None
