"""Sharding rules: the table from logical axis names to mesh axes, and meshes, PartitionSpecs and batches made by it.

| mesh axis | shards |
|---|---|
| `data` | rows of the batch |
| `fsdp` | rows, and parameters |
| `expert` | rows, and parameters; experts by their number, tokens travel to them |
| `tensor` | heads, hidden units of ffns, vocabulary |
| `sequence` | the tokens of a row |

Without `expert`, experts are sharded over `fsdp` and all-gathered to the tokens.
"""

import functools
import math
import typing

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficientllm.errors import FieldError, UserError, did_you_mean
from efficientllm.registry import parse_spec
from efficientllm.typing import Batch, Mesh, PyTree

AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH = ("data", "fsdp", "expert")
# The first rule whose mesh axes divide the dimension applies. A mesh axis is used once in a PartitionSpec, so an expert
# kernel is sharded over experts and not also over `embed`. Other parameters are sharded over `expert` as over `fsdp`:
# replicated, they and their moments could take more memory than the experts that the axis shards.
RULES = (
    ("batch", BATCH),
    ("group_batch", "data"),  # rows that the devices of an fsdp and expert group share
    ("length", "sequence"),
    ("token_rows", ("sequence", *BATCH)),  # the shards of a row as separate rows
    ("channels", ("tensor", "sequence")),  # of activations that need all tokens of a row, but not all channels
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


def make_mesh(spec: str, devices: typing.Sequence | None = None) -> Mesh:
    """Makes the mesh that `config.mesh` describes, such as `"data=-1, tensor=2"`, over `devices` (default: all).

    An axis of -1 takes the devices that the others leave. Raises UserError for an unknown axis, for a size that is no
    number of devices, and for a product of sizes that is not the number of devices.
    """
    devices = devices or jax.devices()
    shape = _axis_sizes(spec)
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise FieldError("mesh", "only one axis may be -1; give the others a number of devices", spec)
    if free:
        shape[free[0]] = max(1, len(devices) // fixed)
    if (count := math.prod(shape.values())) != len(devices):
        raise FieldError(
            "mesh", f"needs {count} devices; there are {len(devices)}; let one axis be -1 to take all", spec
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=types, devices=devices)


def _axis_sizes(spec):
    """Parses `"data=-1, tensor=2"` into the size of each mesh axis. Raises FieldError."""
    try:
        _, sizes = parse_spec(f"mesh({spec})")
    except UserError:
        raise FieldError("mesh", "is not a mesh; write sizes of axes: 'data=2, fsdp=-1'", spec) from None
    for axis in sizes:
        if axis not in AXES:
            hint = f"{', '.join(AXES)}{did_you_mean(axis, AXES)}"
            raise FieldError("mesh", f"no mesh axis {axis!r}; axes: {hint}", spec)
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    if any(not isinstance(size, int) or (size < 1 and size != -1) for size in shape.values()):
        raise FieldError("mesh", "an axis must be a whole number of devices, or -1 for all that are left", spec)
    return shape


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the abstract mesh in scope (`jax.set_mesh`), or None: unsharded code needs no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def is_alone() -> bool:
    """Returns whether the traced code runs on one device, or inside a `shard_map` over all mesh axes.

    Only there can a custom kernel be called: XLA cannot partition a kernel that it did not write.
    """
    mesh = current_mesh()
    return mesh is None or mesh.size == 1 or mesh.are_all_axes_manual


def spec(axes: tuple, shape: tuple, mesh: Mesh) -> P:
    """Returns the PartitionSpec of an array of `shape` with logical `axes` (a name or None for each dimension).

    A dimension that its mesh axes do not divide is replicated.
    """
    used: set = set()
    entries: list = []
    for name, size in zip(axes, shape, strict=True):
        free = next((free for free in _free(name, used, mesh) if size % _product(mesh, free) == 0), ())
        used.update(free)
        entries.append(free if len(free) > 1 else free[0] if free else None)
    return P(*entries)


def _free(name, used, mesh):
    """Yields, for each rule of a logical axis, its mesh axes that are not in `used` and have more than one device."""
    for rule, wanted in RULES:
        if rule == name:
            wanted = (wanted,) if isinstance(wanted, str) else wanted
            if free := tuple(axis for axis in wanted if axis not in used and mesh.shape[axis] > 1):
                yield free


def _product(mesh, axes):
    return math.prod(mesh.shape[axis] for axis in axes)


def count_shards(axis: str, size: int) -> int:
    """Counts the shards of a dimension of `size` with this logical axis on the mesh in scope; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else count(mesh, spec((axis,), (size,), mesh)[0])


def count(mesh: Mesh, entry: str | tuple | None) -> int:
    """Counts the shards of a dimension whose entry in a PartitionSpec is `entry`."""
    return 1 if entry is None else _product(mesh, (entry,) if isinstance(entry, str) else entry)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation by its logical axes on the mesh in scope; without a mesh, returns it."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def shapes(tree: PyTree, axes: PyTree) -> PyTree:
    """Adds to the abstract arrays of `tree` their sharding on the mesh in scope, by `axes`: for each array a tuple of
    logical axes. Without a mesh, returns the tree."""
    if current_mesh() is None:
        return tree
    mesh = jax.sharding.get_mesh()

    def add_sharding(leaf, axes):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(axes, leaf.shape, mesh)))

    return jax.tree.map(add_sharding, tree, axes)


def local_bytes(tree: PyTree) -> int:
    """Sums the bytes of one shard of each array, abstract or not; an array without a sharding counts whole."""

    def shard_bytes(leaf):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """Returns the NamedSharding of each leaf of a tree whose parameters are boxed with their logical axes."""

    def sharding_of(leaf):
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        return NamedSharding(mesh, spec(axes, shape, mesh))

    return jax.tree.map(sharding_of, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def abstract_shards(boxed: PyTree, mesh: Mesh) -> PyTree:
    """Unboxes a tree of parameters into abstract arrays, each with its sharding on `mesh`."""

    def abstract(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, nn.unbox(boxed), shardings(boxed, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axes: tuple[str | None, ...] = ("length",)) -> NamedSharding:
    """Returns the sharding of a batch's arrays: rows over `data`, `fsdp` and `expert`, tokens over `sequence`.

    `axes` are the logical axes after the rows.
    """
    return NamedSharding(mesh, P(BATCH, *("sequence" if axis == "length" else None for axis in axes)))


def count_row_shards(mesh: Mesh) -> int:
    """Counts the shards of the rows of a batch."""
    return _product(mesh, BATCH)


@functools.cache
def process_share(mesh: Mesh) -> tuple[int, int]:
    """Returns `(index, count)`: this process reads part `index` of the `count` equal parts of a batch's rows.

    Processes whose devices hold the same rows, as along `tensor` or `sequence`, read the same part.
    Raises UserError for a mesh that does not give each process a run of rows, all of one length.
    """
    return share_of(mesh, jax.process_index(), lambda device: device.process_index)


def share_of(mesh: Mesh, process: int, process_of: typing.Callable[[typing.Any], int]) -> tuple[int, int]:
    """Returns `process_share` of a process, where `process_of(device)` is the process that a device belongs to."""
    blocks = NamedSharding(mesh, P(BATCH)).devices_indices_map((count_row_shards(mesh),))
    process_rows: dict[int, set] = {}
    for device, (block,) in blocks.items():
        process_rows.setdefault(process_of(device), set()).update(range(*block.indices(count_row_shards(mesh))))
    shares = sorted({tuple(sorted(rows)) for rows in process_rows.values()})
    if sum(shares, ()) != tuple(range(count_row_shards(mesh))) or len(set(map(len, shares))) > 1:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise FieldError(
            "mesh",
            f"{sizes} gives processes rows that overlap; "
            "let data x fsdp x expert be a multiple or a divisor of the number of processes",
        )
    return shares.index(tuple(sorted(process_rows[process]))), len(shares)


def to_device(batch: Batch, shardings: dict[str, NamedSharding]) -> Batch:
    """Moves this process's rows to its devices, as its shards of the global batch, by the sharding of each array.

    Arrays without a sharding, which no program reads, stay. Raises FieldError for an array that `batch` has not.
    """

    def place(rows, sharding):
        index, count = process_share(sharding.mesh)
        first, shape = index * len(rows), (count * len(rows), *rows.shape[1:])

        def read(of):
            start, stop, _ = of[0].indices(shape[0])
            return rows[start - first : stop - first, *of[1:]]

        return jax.make_array_from_callback(shape, sharding, read)

    return {name: place(rows, shardings[name]) for name, rows in _read_by_program(batch, shardings).items()}


def to_compiled(batch: Batch, shardings: dict[str, NamedSharding]) -> Batch:
    """The batch as an argument of a compiled program whose argument has these shardings; see `to_device`.

    Arrays of the only process stay on the host: such a program places them itself, in a tenth of the time (17 instead
    of 188 us with a call, five arrays and one device; an Intel Xeon with AMX beside other programs, 2026-12-01). A
    jitted function would not: it knows no shardings of them.
    """
    if jax.process_count() == 1:
        return _read_by_program(batch, shardings)
    return to_device(batch, shardings)


def _read_by_program(batch, shardings):
    """The arrays that have a sharding. Raises FieldError for one that is missing."""
    if missing := sorted(shardings.keys() - batch.keys()):
        raise FieldError("data", f"has no {' and no '.join(missing)}, which the model is conditioned on")
    return {name: rows for name, rows in batch.items() if name in shardings}
