"""Matrix product of activations with quantized rows, and the choice of its kernel: C++, Pallas or XLA."""

import functools
import importlib.util
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.ops import native
from efficientllm.runtime import kernel_choice
from efficientllm.weights import Axes, Precision

if typing.TYPE_CHECKING:
    from efficientllm.quant.base import Rows

MeshAxes = str | tuple[str, ...] | None  # an entry of a PartitionSpec

# Most rows of x for the native product; with many more, dequantizing once and multiplying is faster
# (experiments/quantization/products.py).
FEW_ROWS = 64


class Layout(typing.NamedTuple):
    """Mesh axes that shard a product: the rows of x, its inputs (`along`), and the outputs (`across`)."""

    rows: MeshAxes
    along: MeshAxes
    across: MeshAxes


def product(
    x: jax.Array,
    leaf: "Rows",
    precision: Precision,
    out_dtype: jax.typing.DTypeLike | None,
    axes: Sequence[str | None] | None = None,
) -> jax.Array:
    """Multiply `x[..., k] @ rows[r, k].T` -> `[..., r]`; the gradient of the leaf is zero.

    `axes` are the logical names of (k, r). With `axes`, on a mesh, the Pallas kernel multiplies each device's shard.
    """
    return _multiply(x, (leaf,), precision, out_dtype, _layout(x, leaf, axes))[0]


def together(x: jax.Array, leaves: Sequence["Rows"], precision: Precision) -> list[jax.Array] | None:
    """Multiply x by each of `leaves` in one call of the C++ or Pallas kernel; None where neither takes them all."""
    rows = x.size // x.shape[-1]
    return _multiply(x, leaves, precision, None, None) if _native(rows, leaves) or _joins(leaves) else None


def _multiply(x, leaves, precision, out_dtype, layout):
    ys = _products(x.reshape(-1, x.shape[-1]), leaves, precision.product, layout)
    return [y_mr.reshape(*x.shape[:-1], -1).astype(out_dtype or x.dtype) for y_mr in ys]


def _layout(x, leaf, axes):
    """The Layout of a product on the mesh in scope; None on one device, and where no Pallas kernel takes a shard.

    The rows of x are sharded first: weights on the same mesh axes are all-gathered, packed. The inputs are sharded
    where each shard holds whole groups.
    """
    mesh = sharding.current_mesh()
    if axes is None or sharding.is_alone() or mesh.shape["sequence"] > 1 or not has_tiles(leaf):
        return None
    (outputs, row_bytes), scale_groups = leaf.values.shape, leaf.scale.shape[-1]
    groups = scale_groups if leaf.width == 2 * row_bytes else 1
    layout = Layout(*sharding.spec(("batch", *axes), (x.shape[0], groups, outputs), mesh))
    return (
        layout
        if _tiles().takes(
            outputs // sharding.count(mesh, layout.across), row_bytes // scale_groups, kernel_choice.platform()
        )
        else None
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _products(x_mk, leaves, operand, layout):
    rows = _native(x_mk.shape[0], leaves)
    if rows is None and len(leaves) == 1:
        return [_product(x_mk, leaves[0], operand, layout)]
    if rows is None:
        kernel_choice.record_kernel(f"matmul_{leaves[0].name}", "pallas")
        return _tiles().products(x_mk, leaves, operand, kernel_choice.platform())
    for leaf in leaves:
        kernel_choice.record_kernel(f"matmul_{leaf.name}", "ffi")
    x_scale = leaves[0].x_scale
    return native.products(x_mk if x_scale is None else x_mk.astype(jnp.float32) * x_scale, rows)


def _native(vectors, leaves):
    """The leaves as arguments of `native.products`; None where it does not take all of them with so many vectors."""
    if not is_native(vectors) or (len(leaves) > 1 and any(leaf.x_scale is not None for leaf in leaves)):
        return None
    rows = [leaf.native() for leaf in leaves]
    return None if any(leaf is None for leaf in rows) or len({leaf.layout for leaf in rows}) > 1 else rows


def _joins(leaves):
    """Whether one call of the Pallas kernel multiplies by all of `leaves`."""
    return all(map(is_tiled, leaves)) and _tiles().joins(leaves, kernel_choice.platform())


def _product(x_mk, leaf, operand, layout):
    y_mr = _sharded(x_mk, leaf, operand, layout) if layout else _tiled(x_mk, leaf, operand) if is_tiled(leaf) else None
    if y_mr is not None:
        kernel_choice.record_kernel(f"matmul_{leaf.name}", "pallas")
        return y_mr
    kernel_choice.record_kernel(f"matmul_{leaf.name}", "xla")
    return leaf.product(x_mk, operand)


def is_native(rows: int) -> bool:
    """Whether `efficientllm.ops.native` multiplies `rows` rows of x: few, on one CPU device."""
    return rows <= FEW_ROWS and native.is_usable()


def has_tiles(leaf: "Rows") -> bool:
    """Whether `pallas_int4` multiplies by `leaf` on this platform: NVIDIA and TPU."""
    if not leaf.is_tileable:
        return False
    return kernel_choice.platform() == "tpu" or (kernel_choice.platform() == "gpu" and has_triton())


@functools.cache
def has_triton() -> bool:
    """Whether this JAX lowers Pallas kernels through Triton, which JAX 0.11 deprecated.

    Without Triton, XLA multiplies int4 on GPUs, and a row's kernels record it. Mosaic GPU and jax_triton may
    replace Triton here once a GPU shows that they are as fast.
    """
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def is_tiled(leaf: "Rows") -> bool:
    """Whether `pallas_int4` multiplies by `leaf` whatever its axes are: it takes the leaf, on one device."""
    return has_tiles(leaf) and sharding.is_alone()


def _tiles():
    from efficientllm.quant import pallas_int4  # Pallas takes a second to import

    return pallas_int4


def _tiled(x_mk, leaf, operand):
    return _tiles().product(x_mk, leaf, operand, kernel_choice.platform())


def _sharded(x_mk, leaf, operand, layout):
    """`_tiled` on each device's shard; products of shards of the inputs are summed."""

    def multiply_shard(x_mk, leaf):
        y_mr = _tiled(x_mk, leaf.replace(columns=x_mk.shape[-1]), operand)
        return y_mr if layout.along is None else jax.lax.psum(y_mr, layout.along)

    axes = leaf.axes((layout.along, layout.across))
    of_leaf = jax.tree.map(lambda names: P(*names), axes, is_leaf=lambda names: isinstance(names, Axes))
    specs = (P(layout.rows, layout.along), of_leaf)
    return jax.shard_map(multiply_shard, in_specs=specs, out_specs=P(layout.rows, layout.across), check_vma=False)(
        x_mk, leaf
    )


def contract(x: jax.Array, rows: jax.Array, axis: int = 1) -> jax.Array:
    """Compute the float32 product of `x[m, :]` with `rows`, contracted over their `axis`."""
    return jax.lax.dot_general(x, rows, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(x_mk, leaves, operand, layout):
    return _products(x_mk, leaves, operand, layout), (leaves, jnp.zeros(0, x_mk.dtype))


def _backward(operand, layout, residuals, dys):
    # Dequantize again: saved rows of all layers would be in memory at once.
    leaves, like_x = residuals
    dx_mk = sum(
        contract(dy_mr.astype(operand), leaf.operand_rows(dy_mr, operand), 0)
        for leaf, dy_mr in zip(leaves, dys, strict=True)
    )
    return dx_mk.astype(like_x.dtype), None


_products.defvjp(_forward, _backward)
