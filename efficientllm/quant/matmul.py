"""The product of activations with compressed rows, and which kernel it runs on."""

import functools
import importlib.util
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.ops import native
from efficientllm.runtime import kernel_choice
from efficientllm.weights import Axes

# Rows of x up to which the native product is taken; far above, decompressing once and multiplying is faster
# (experiments/quantization/products.py).
FEW = 64


class Layout(typing.NamedTuple):
    """The mesh axes that divide a product: the rows of x, its width, and the outputs; each as in a PartitionSpec."""

    rows: typing.Any
    along: typing.Any
    across: typing.Any


def product(x, leaf, precision, out_dtype, axes=None):
    """`x[..., K] @ rows[R, K].T` -> `[..., R]`; the gradient of the leaf is zero.

    `axes` are the logical names of (K, R). With them, on a mesh, a kernel of ours multiplies each device's own part.
    """
    return _each(x, (leaf,), precision, out_dtype, _layout(x, leaf, axes))[0]


def together(x, leaves, precision):
    """`product` of x with each of `leaves`, in one call of a kernel of ours; None where they have none."""
    rows = x.size // x.shape[-1]
    return _each(x, leaves, precision, None, None) if _native(rows, leaves) or _joins(leaves) else None


def _each(x, leaves, precision, out_dtype, layout):
    ys = _products(x.reshape(-1, x.shape[-1]), leaves, precision.product, layout)
    return [y_MR.reshape(*x.shape[:-1], -1).astype(out_dtype or x.dtype) for y_MR in ys]


def _layout(x, leaf, axes):
    """The Layout of a product on the mesh in scope; None on one device, and where a part has no kernel of ours.

    Rows are divided first: weights that lie over the same devices are gathered, compressed, for them. The width is
    divided where each part holds whole groups.
    """
    mesh = sharding.current_mesh()
    if axes is None or sharding.is_alone() or mesh.shape["sequence"] > 1 or not has_tiles(leaf):
        return None
    (R, W), G = leaf.values.shape, leaf.scale.shape[-1]
    groups = G if leaf.width == 2 * W else 1
    layout = Layout(*sharding.spec(("batch", *axes), (x.shape[0], groups, R), mesh))
    return (
        layout if _tiles().takes(R // sharding.count(mesh, layout.across), W // G, kernel_choice.platform()) else None
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _products(x_MK, leaves, operand, layout):
    rows = _native(x_MK.shape[0], leaves)
    if rows is None and len(leaves) == 1:
        return [_product(x_MK, leaves[0], operand, layout)]
    if rows is None:
        kernel_choice.record_kernel(f"matmul_{leaves[0].name}", "pallas")
        return _tiles().products(x_MK, leaves, operand, kernel_choice.platform())
    for leaf in leaves:
        kernel_choice.record_kernel(f"matmul_{leaf.name}", "ffi")
    x_scale = leaves[0].x_scale
    return native.products(x_MK if x_scale is None else x_MK.astype(jnp.float32) * x_scale, rows)


def _native(vectors, leaves):
    """The leaves as `native.products` takes them with so many vectors; None where it does not, not all of them."""
    if not is_native(vectors) or (len(leaves) > 1 and any(leaf.x_scale is not None for leaf in leaves)):
        return None
    rows = [leaf.native() for leaf in leaves]
    return None if any(each is None for each in rows) or len({each.layout for each in rows}) > 1 else rows


def _joins(leaves):
    """Whether one call of `tiled` multiplies with all of `leaves`."""
    return all(map(is_tiled, leaves)) and _tiles().joins(leaves, kernel_choice.platform())


def _product(x_MK, leaf, operand, layout):
    y_MR = _divided(x_MK, leaf, operand, layout) if layout else _tiled(x_MK, leaf, operand) if is_tiled(leaf) else None
    if y_MR is not None:
        kernel_choice.record_kernel(f"matmul_{leaf.name}", "pallas")
        return y_MR
    kernel_choice.record_kernel(f"matmul_{leaf.name}", "xla")
    return leaf.product(x_MK, operand)


def is_native(rows):
    """Whether a product of `rows` vectors is one for `efficientllm.ops.native`: few, and on one CPU device."""
    return rows <= FEW and native.is_usable()


def has_tiles(leaf):
    """Whether `pallas_int4` multiplies with `leaf` on this platform: NVIDIA and TPU."""
    if not leaf.is_tileable:
        return False
    return kernel_choice.platform() == "tpu" or (kernel_choice.platform() == "gpu" and has_triton())


@functools.cache
def has_triton():
    """Whether this JAX lowers Pallas kernels through Triton, which 0.11 deprecated and a later one will not have.

    Without it int4 goes through XLA on GPUs, and a row's kernels say so. The successors, Mosaic GPU and the bindings
    of jax_triton, are to be taken up where a GPU shows that they are as fast.
    """
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def is_tiled(leaf):
    """Whether a product with `leaf` is one for `tiled` whatever its axes are: it has tiles, and one device."""
    return has_tiles(leaf) and sharding.is_alone()


def _tiles():
    from efficientllm.quant import pallas_int4  # Pallas takes a second to import

    return pallas_int4


def _tiled(x_MK, leaf, operand):
    return _tiles().product(x_MK, leaf, operand, kernel_choice.platform())


def _divided(x_MK, leaf, operand, layout):
    """`_tiled` on each device, over its part; parts of the width are summed."""

    def part(x_MK, leaf):
        y_MR = _tiled(x_MK, leaf.replace(columns=x_MK.shape[-1]), operand)
        return y_MR if layout.along is None else jax.lax.psum(y_MR, layout.along)

    axes = leaf.axes((layout.along, layout.across))
    of_leaf = jax.tree.map(lambda names: P(*names), axes, is_leaf=lambda names: isinstance(names, Axes))
    specs = (P(layout.rows, layout.along), of_leaf)
    return jax.shard_map(part, in_specs=specs, out_specs=P(layout.rows, layout.across), check_vma=False)(x_MK, leaf)


def contract(x, rows, axis=1):
    """float32 product of `x` with `rows`, along their `axis`."""
    return jax.lax.dot_general(x, rows, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(x_MK, leaves, operand, layout):
    return _products(x_MK, leaves, operand, layout), (leaves, jnp.zeros(0, x_MK.dtype))


def _backward(operand, layout, residuals, dys):
    # Decompressed again: kept, all layers' rows would lie in memory at once.
    leaves, like_x = residuals
    dx_MK = sum(
        contract(dy_MR.astype(operand), leaf.dequantize_after(dy_MR).rows().astype(operand), 0)
        for leaf, dy_MR in zip(leaves, dys, strict=True)
    )
    return dx_MK.astype(like_x.dtype), None


_products.defvjp(_forward, _backward)
