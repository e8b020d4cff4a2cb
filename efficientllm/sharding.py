"""Logical axis names to mesh axes: one table, and the few functions that read it.

A mesh has the axes `data` (rows only), `fsdp` (rows and parameters), `expert` (rows and parameters, of which experts by
number: tokens travel to them), `tensor` (heads, ffn hidden, vocabulary) and `sequence` (the tokens of a row). Without
`expert`, experts are stored split over `fsdp`, and gathered to the tokens.
"""

import functools
import math

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficientllm.errors import UserError, did_you_mean
from efficientllm.registry import parse_spec

AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH = ("data", "fsdp", "expert")
# The first that divides a dimension wins. A mesh axis is used once in a spec, so an expert kernel is split over
# experts, not also over `embed`. Parameters that are no expert's are split over `expert` as over `fsdp`: whole on each
# of its devices, they and their moments could outweigh the experts that the axis divides.
RULES = (
    ("batch", BATCH),
    ("group_batch", "data"),  # rows that the devices of an fsdp and expert group share
    ("length", "sequence"),
    ("token_rows", ("sequence", *BATCH)),  # pieces of rows as rows of their own
    ("channels", ("tensor", "sequence")),  # of activations that need every token of a row, but not every channel
    ("channels", "tensor"),
    ("expert", "expert"),
    ("expert", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", ("fsdp", "expert")),
    ("embed", "fsdp"),
)


def make_mesh(spec, devices=None):
    """`"data=-1, tensor=2"` -> a mesh over all devices; -1 takes what the others leave. Raises UserError."""
    devices = devices or jax.devices()
    where = f"config.mesh = {spec!r}"
    _, given = parse_spec(f"mesh({spec})", "config.mesh")
    for axis in given:
        if axis not in AXES:
            raise UserError(f"{where}: no mesh axis {axis!r}; axes: {', '.join(AXES)}{did_you_mean(axis, AXES)}")
    shape = {axis: given.get(axis, 1) for axis in AXES}
    if any(not isinstance(size, int) or (size < 1 and size != -1) for size in shape.values()):
        raise UserError(f"{where}: a mesh axis is a whole number of devices, or -1 for all that are left")
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"{where}: only one axis may be -1")
    if free:
        shape[free[0]] = max(1, len(devices) // fixed)
    if math.prod(shape.values()) != len(devices):
        raise UserError(f"{where} makes {math.prod(shape.values())} devices; there are {len(devices)}")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=types, devices=devices)


def current_mesh():
    """The mesh in scope (`jax.set_mesh`), or None: unsharded code needs no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def is_alone():
    """Whether what is traced here is for one device, or for each by itself (in a `shard_map` over all mesh axes): what
    XLA did not write it cannot divide over a mesh."""
    mesh = current_mesh()
    return mesh is None or mesh.size == 1 or mesh.are_all_axes_manual


def spec(axes, shape, mesh):
    """The PartitionSpec of an array with logical `axes`; an axis that does not divide its dimension is left whole."""
    used, parts = set(), []
    for name, size in zip(axes, shape, strict=True):
        free = next((free for free in _free(name, used, mesh) if size % _product(mesh, free) == 0), ())
        used.update(free)
        parts.append(free if len(free) > 1 else free[0] if free else None)
    return P(*parts)


def _free(name, used, mesh):
    """The mesh axes of each rule for a logical axis that are not used yet and have more than one device."""
    for rule, wanted in RULES:
        if rule == name:
            wanted = (wanted,) if isinstance(wanted, str) else wanted
            if free := tuple(axis for axis in wanted if axis not in used and mesh.shape[axis] > 1):
                yield free


def _product(mesh, axes):
    return math.prod(mesh.shape[axis] for axis in axes)


def ways(axis, size):
    """Over how many devices the mesh in scope divides a dimension of `size` with this logical axis; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else count(mesh, spec((axis,), (size,), mesh)[0])


def count(mesh, part):
    """Over how many devices of the mesh a part of a PartitionSpec divides a dimension."""
    return 1 if part is None else _product(mesh, (part,) if isinstance(part, str) else part)


def constrain(x, *axes):
    """Pins an activation's layout to its logical axes under the mesh in scope; without a mesh, does nothing."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def shapes(tree, axes):
    """Abstract arrays as those of `tree`, laid out over the mesh in scope by their logical `axes`, tuples."""
    if current_mesh() is None:
        return tree
    mesh = jax.sharding.get_mesh()

    def one(leaf, axes):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(axes, leaf.shape, mesh)))

    return jax.tree.map(one, tree, axes)


def local_bytes(tree):
    """Bytes of arrays, abstract or not, on the device of them that holds most; whole ones where nothing is said."""

    def one(leaf):
        where = getattr(leaf, "sharding", None)
        shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def shardings(boxed, mesh):
    """The NamedSharding of every leaf of a tree whose parameters are boxed with their logical axes."""

    def one(leaf):
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        return NamedSharding(mesh, spec(axes, shape, mesh))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def on_shards(boxed, mesh):
    """The abstract arrays of a boxed tree, unboxed, each with its sharding on `mesh`."""

    def abstract(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(abstract, nn.unbox(boxed), shardings(boxed, mesh))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh):
    """Of arrays `[B, T]`: rows are split over `data`, `fsdp` and `expert`, their tokens over `sequence`."""
    return NamedSharding(mesh, P(BATCH, "sequence"))


def row_ways(mesh):
    """Over how many devices the rows of a batch are split."""
    return _product(mesh, BATCH)


@functools.cache
def process_share(mesh):
    """`(index, count)`: which of `count` equal parts of a batch's rows this process reads.

    Processes whose devices hold the same rows, as along `tensor` or `sequence`, read the same part.
    Raises UserError for a mesh whose rows are not dealt out to processes in equal runs.
    """
    return share_of(mesh, jax.process_index(), lambda device: device.process_index)


def share_of(mesh, process, process_of):
    """`process_share` of a process, where `process_of(device)` says which one a device belongs to."""
    blocks = NamedSharding(mesh, P(BATCH)).devices_indices_map((row_ways(mesh),))
    held = {}
    for device, (block,) in blocks.items():
        held.setdefault(process_of(device), set()).update(range(*block.indices(row_ways(mesh))))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(parts, ()) != tuple(range(row_ways(mesh))) or len(set(map(len, parts))) > 1:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"config.mesh: {sizes} gives processes rows that overlap; "
            "let data x fsdp x expert divide the processes, or they it"
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)


def to_device(batch, mesh):
    """This process's rows as its part of the global batch."""
    where, (index, count) = batch_sharding(mesh), process_share(mesh)

    def one(rows):
        first, shape = index * len(rows), (count * len(rows), *rows.shape[1:])

        def part(of):
            start, stop, _ = of[0].indices(shape[0])
            return rows[start - first : stop - first, *of[1:]]

        return jax.make_array_from_callback(shape, where, part)

    return {name: one(rows) for name, rows in batch.items()}
