"""Matrix products under a stated precision: every product of the package goes through `matmul`.

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

from efficientllm import sharding
from efficientllm.registry import build, register
from efficientllm.runtime import kernel_choice
from efficientllm.typing import AxisNames, Params, PyTree


def path_of(keys: tuple) -> str:
    """Joins a key path of a parameter tree: `groups/block_0/mixer/q/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Precision policy over float32 parameters: the dtype of activations, and of both operands of a matrix product.

    Products accumulate in float32 everywhere. Softmax, norms, routers, rotary angles and the loss are float32 under
    every policy.
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
        if kernel_choice.platform() == "cpu" and x.dtype == precision.product == jnp.float32:
            return _product(x, self.table, precision.product, jnp.dtype(out_dtype or x.dtype), True)
        return matmul(x, self.table.T, precision, out_dtype)

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
    product = precision.product
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if product != x.dtype:
        return _product(x, w, product, jnp.dtype(jnp.float32)).astype(out_dtype)
    if kernel_choice.platform() == "cpu" and product == jnp.float32:
        return _product(x, w, product, out_dtype)
    return jnp.matmul(x, w.astype(product), preferred_element_type=out_dtype)


def matmul_together(x: jax.Array, ws: list, precision: Precision | str) -> list | None:
    """Multiplies x with each of `ws` in one call; None where their form has no such product."""
    first, *others = ws
    alike = isinstance(first, Weight) and all(type(w) is type(first) for w in others)
    return first.together(x, others, Precision.of(precision)) if alike else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, w, operand, result, transposed=False):
    """Multiplies operands rounded to `operand`, accumulated to `result`, in the forward and the backward pass.

    Autodiff of a mixed product would multiply the float32 cotangent with an upcast copy of the other operand. With
    `transposed`, w is `[out, in]`.
    """
    w = w.astype(operand)
    return jnp.matmul(x.astype(operand), w.T if transposed else w, preferred_element_type=result)


def _product_forward(x, w, operand, result, transposed):
    low = x.astype(operand), w.astype(operand)
    # Zero-size arrays carry the operands' dtypes: a residual must be an array.
    return _product(*low, operand, result, transposed), (*low, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _product_backward(operand, result, transposed, residuals, dy):
    x, w, like_x, like_w = residuals
    dy = dy.astype(operand)
    dx = jnp.matmul(dy, w if transposed else w.T, preferred_element_type=result)
    if x.ndim > 2 and sharding.count_shards("length", x.shape[1]) > 1:
        # Rows and tokens are sharded over different mesh axes: a reshape to one dimension would all-gather them first.
        leading = tuple(range(x.ndim - 1))
        pair = (dy, x) if transposed else (x, dy)
        dw = jax.lax.dot_general(*pair, ((leading, leading), ((), ())), preferred_element_type=result)
    else:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dw = jnp.matmul(dy.T, x, preferred_element_type=result) if transposed else _weight_gradient(x, dy, result)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


def _weight_gradient(x, dy, result):
    """Computes `x.T @ dy`, on CPUs with a separate transpose: XLA there multiplies a transposed operand at 0.6x to
    0.9x of the speed, fuses slow strided copies with its producer, and refuses bfloat16."""
    if kernel_choice.platform() != "cpu":
        return jnp.matmul(x.T, dy, preferred_element_type=result)
    if dy.shape[1] * sum(x.shape) < x.size:  # a few columns, an adapter's: they and the result are the smaller to turn
        return _weight_gradient(dy, x, result).T
    alone = jax.lax.optimization_barrier
    return alone(jnp.matmul(alone(alone(x).T), alone(dy), preferred_element_type=result))


_product.defvjp(_product_forward, _product_backward)
