"""Loads checkpoint tensors directly onto shards.

The host holds one piece at a time: a slice of one shard of one parameter. Shards larger than `PIECE` are filled on the
device, so host memory never holds a whole model or a whole stack of layers.
"""

import functools
import typing
from collections.abc import Callable, Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

PIECE = 128 * 2**20  # bytes


def load_parameters(
    leaves: Mapping[str, typing.Any],
    tensors: typing.Any,
    abstract: typing.Any,
    dtype: jax.typing.DTypeLike | None = None,
    transform: Callable[[str, jax.Array], typing.Any] | None = None,
) -> typing.Any:
    """Loads the parameters onto the shardings of `abstract`.

    Args:
      leaves: from `parameter_map.bind_parameters`.
      tensors: the open checkpoint.
      abstract: a tree of `jax.ShapeDtypeStruct` with `sharding`; without one, the first device holds all.
      dtype: of all parameters; None keeps the dtypes of `abstract`.
      transform: `transform(path, array)` returns what replaces a loaded parameter, before the next one is read.
    """
    transform = transform or (lambda path, array: array)
    flat = flax.traverse_util.flatten_dict(abstract, sep="/")
    placed = {
        path: transform(
            path, _place(leaf, functools.partial(leaves[path].read, tensors), jnp.dtype(dtype or leaf.dtype))
        )
        for path, leaf in flat.items()
    }
    return flax.traverse_util.unflatten_dict(placed, sep="/")


def _place(leaf, read, dtype):
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    devices_of = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(where.indices(size)[:2] for where, size in zip(index, leaf.shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    shards = [shard for key, devices in devices_of.items() for shard in _shards(key, devices, read, dtype)]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _shards(key, devices, read, dtype):
    """Copies of one shard on each of `devices`; `key` holds its (start, stop) along each axis."""
    shape = tuple(stop - start for start, stop in key)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= PIECE or not shape or shape[0] == 1:
        piece = read(tuple(slice(*bounds) for bounds in key), dtype)
        return [jax.device_put(piece, device) for device in devices]
    rows = max(1, shape[0] * PIECE // size)
    shards = [_empty(shape, dtype, device) for device in devices]
    (begin, end), *rest = key
    for start in range(begin, end, rows):
        piece = read((slice(start, min(start + rows, end)), *(slice(*bounds) for bounds in rest)), dtype)
        shards = [_write(shard, jax.device_put(piece, shard.sharding), start - begin) for shard in shards]
    return shards


def _empty(shape, dtype, device):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=SingleDeviceSharding(device))()


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole, piece, row):
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, row, 0)
