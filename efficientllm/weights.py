"""Matrix products: every one of the package goes through `matmul`, under a stated precision.

Kernels are `[..., in, out]`, so that adapters, quantisers and name tables see one layout. A kernel is an array, or a
`Weight`: a leaf that holds arrays of its own.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.registry import build, register
from efficientllm.runtime import kernel_choice


def path_of(keys):
    """`groups/block_0/mixer/q/kernel` for a key path of a parameter tree."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy over float32 parameters: the dtype of activations, and of both operands of a matrix product.

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
        """The policy that a spec names, or the policy itself. Raises UserError for a spec that names none."""
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
    """The dtype of activations under a policy, or the one that a spec names."""
    return Precision.of(precision).activation


class Weight:
    """What may stand in the place of a kernel or a table: an adapter around it, or a quantised form of it.

    Subclasses are flax struct dataclasses, hence trees of arrays, and are scanned, sharded, saved and mapped as such.
    Their arrays have the leading axes (layers, experts) that the kernel has. They have a `shape`, the kernel's.
    `by_group` is True for those that grouped products take as they are, one of a stack of kernels at a time.
    """

    by_group = False

    def apply(self, x, product, of_rows):
        """`x` times the kernel, or times each row's own of a stack of kernels.

        `product(x, kernel)` is the caller's way to multiply, dense or by groups; `of_rows(v)` gives the rows of `x`
        their kernel's vector of `v` `[..., N]`.
        """
        return product(x, self.dense())

    def matmul(self, x, precision, out_dtype, axes=None):
        """`x[..., in] @ self[in, out]`; overridden where the form has a product of its own. `axes` as in `matmul`."""
        return self.apply(x, lambda x, w: matmul(x, w, precision, out_dtype, axes), lambda v: v)

    def has_vector_product(self, rows):
        """Whether `matmul` with so few rows of x is one call of a kernel of ours that dequantizes nothing ahead."""
        return False

    def has_tiled_product(self):
        """Whether `matmul` dequantizes tile by tile in a kernel of ours, on the one device that traces this."""
        return False

    def together(self, x, others, precision):
        """`x` times this kernel and those of `others`, leaves of this type, in one call; None where there is none."""
        return None

    def dense(self):
        """The kernel as one float32 array."""
        raise NotImplementedError(type(self).__name__)

    def dequantize_after(self, x):
        """This leaf, tied to `x` so that XLA cannot hoist its dequantization out of the loop that makes `x`."""
        return self

    def axes(self, names):
        """This leaf with the logical axes of each array in its place, for a kernel with the axes `names`."""
        raise NotImplementedError(type(self).__name__)

    def can_shard_inputs(self, shards):
        """Whether the kernel's input dimension can be split into so many shards without dequantizing it."""
        return True

    def as_input_sharded(self, shards):
        """A form whose arrays can be sharded over the kernel's input dimension; dense where this one cannot be."""
        return self.dense()

    def take(self, index):
        """The rows `index` of a table `[rows, width]`, float32."""
        return jnp.take(self.dense(), index, axis=0)

    @property
    def T(self):
        """The transposed kernel: an array or a Weight."""
        return self.dense().T


@flax.struct.dataclass
class TransposedKernel(Weight):
    """A table `[out, in]` that multiplies as the kernel `[in, out]`: the embedding as the head of a tied model.

    CPUs multiply it without a transpose. XLA would transpose it for a product in a loop, and its gradient back: four
    passes over the table.
    """

    table: jax.Array

    @property
    def shape(self):
        return self.table.shape[::-1]

    def matmul(self, x, precision, out_dtype, axes=None):
        if kernel_choice.platform() == "cpu" and x.dtype == precision.product == jnp.float32:
            return _product(x, self.table, precision.product, jnp.dtype(out_dtype or x.dtype), True)
        return matmul(x, self.table.T, precision, out_dtype)

    def dense(self):
        return self.table.T

    def axes(self, names):
        return TransposedKernel(Axes(names[::-1]))


def transposed_kernel(table):
    """The kernel `[in, out]` of a table `[out, in]`."""
    return table.T if isinstance(table, Weight) else TransposedKernel(table)


def dense(w, after=None):
    """The kernel as an array, whatever form it has; not made before the array `after` is known, if one is given."""
    if not isinstance(w, Weight):
        return w
    return w.dense() if after is None else w.dequantize_after(after).dense()


def axes(w, names):
    """The logical axes of a kernel: `names`, or a tree of such for those of a Weight's arrays."""
    return w.axes(names) if isinstance(w, Weight) else Axes(names)


class Axes(tuple):
    """Logical axis names of one array: a leaf of trees, unlike other tuples."""


def can_shard_inputs(w, shards):
    """Whether a kernel's input dimension can be split into so many shards without dequantizing it."""
    return not isinstance(w, Weight) or w.can_shard_inputs(shards)


def as_input_sharded(w, shards):
    """The kernel, in a form whose input dimension can be split into so many shards."""
    return w.as_input_sharded(shards) if isinstance(w, Weight) else w


def take(table, index):
    """`table[index]` for rows of a table, whatever form it has."""
    return table.take(index) if isinstance(table, Weight) else jnp.take(table, index, axis=0)


def box(leaf, names):
    """A kernel boxed with its logical axes `names`: an array, or a Weight whose arrays have boxes of their own."""
    if not isinstance(leaf, Weight):
        return nn.LogicallyPartitioned(leaf, tuple(names))
    return jax.tree.map(box, leaf, leaf.axes(names), is_leaf=lambda axes: isinstance(axes, Axes))


def is_box(leaf):
    """Whether a leaf of a parameter tree is an array boxed with its logical axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def box_as(boxed, params):
    """`params`, arrays and Weights, boxed with the axes that the plain model's tree `boxed` has in their places."""
    return jax.tree.map(lambda plain, leaf: box(leaf, plain.names), boxed, params, is_leaf=is_box)


def resident_bytes(params):
    """Bytes of a tree's arrays, on devices and in a checkpoint of them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def parameter(module, name, init, shape):
    """`module.param`, for one that may be a `Weight`: its arrays need not have the shapes that `init` makes."""
    value = module.get_variable("params", name)
    return value if isinstance(value, Weight) else module.param(name, init, shape)


def matmul(x, w, precision, out_dtype=None, axes=None):
    """`x[..., in] @ w[in, out]` -> `[..., out]` in `x.dtype` (or `out_dtype`).

    `precision` is a policy, or a spec that names one. `axes` are the logical names of (in, out), by which kernels that
    XLA did not write are divided over a mesh.
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


def matmul_together(x, ws, precision):
    """`matmul` of x with each of `ws` in one call; None where they have none."""
    first, *others = ws
    alike = isinstance(first, Weight) and all(type(w) is type(first) for w in others)
    return first.together(x, others, Precision.of(precision)) if alike else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, w, operand, result, transposed=False):
    """A product of operands rounded to `operand`, accumulated to `result`; so are the two of the backward pass.

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
        # Rows and tokens that lie on several devices are no one axis: made one, they would be gathered first.
        leading = tuple(range(x.ndim - 1))
        pair = (dy, x) if transposed else (x, dy)
        dw = jax.lax.dot_general(*pair, ((leading, leading), ((), ())), preferred_element_type=result)
    else:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dw = jnp.matmul(dy.T, x, preferred_element_type=result) if transposed else _weight_gradient(x, dy, result)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


def _weight_gradient(x, dy, result):
    """`x.T @ dy`. On CPUs XLA multiplies a transposed operand at 0.6x to 0.9x of the speed, fuses slow strided
    copies with what makes it, and refuses bfloat16: there the transpose is made first, alone."""
    if kernel_choice.platform() != "cpu":
        return jnp.matmul(x.T, dy, preferred_element_type=result)
    if dy.shape[1] * sum(x.shape) < x.size:  # a few columns, an adapter's: they and the result are the smaller to turn
        return _weight_gradient(dy, x, result).T
    alone = jax.lax.optimization_barrier
    return alone(jnp.matmul(alone(alone(x).T), alone(dy), preferred_element_type=result))


_product.defvjp(_product_forward, _product_backward)
