"""Logical axis names to mesh axes: one table, and the few functions that read it.

A mesh has the axes `data` (rows only), `fsdp` (rows and parameters) and `tensor` (heads, ffn hidden, vocabulary);
experts ride on `fsdp`.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficientllm.errors import UserError, did_you_mean
from efficientllm.registry import parse

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# First match wins; a mesh axis is used once in a spec, so an expert kernel is split over experts, not over `embed`.
RULES = (
    ("batch", BATCH),
    ("group_batch", "data"),  # rows that the devices of an fsdp group share
    ("expert", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)


def make_mesh(spec, devices=None):
    """`"data=-1, tensor=2"` -> a mesh over all devices; -1 takes what the others leave. Raises UserError."""
    devices = devices or jax.devices()
    where = f"config.mesh = {spec!r}"
    _, given = parse(f"mesh({spec})", "config.mesh")
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


def spec(axes, shape, mesh):
    """The PartitionSpec of an array with logical `axes`; an axis that does not divide its dimension is left whole."""
    rules, used, parts = dict(RULES), set(), []
    for name, size in zip(axes, shape, strict=True):
        wanted = rules.get(name, ())
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        free = tuple(axis for axis in wanted if axis not in used and mesh.shape[axis] > 1)
        fits = free and size % math.prod(mesh.shape[axis] for axis in free) == 0
        used.update(free if fits else ())
        parts.append((free if len(free) > 1 else free[0]) if fits else None)
    return P(*parts)


def constrain(x, *axes):
    """Pins an activation's layout to its logical axes under the mesh in scope; without a mesh, does nothing."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def shardings(boxed, mesh):
    """The NamedSharding of every leaf of a tree whose parameters are boxed with their logical axes."""

    def one(leaf):
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        return NamedSharding(mesh, spec(axes, shape, mesh))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh):
    """Rows are split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))
