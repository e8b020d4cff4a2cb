"""Type aliases that say more than `Any`. Importing them imports neither JAX nor ml_collections."""

import os
import typing
from collections.abc import Sequence

if typing.TYPE_CHECKING:
    import jax
    import ml_collections

    Array = jax.Array
    Mesh = jax.sharding.Mesh
    Config = ml_collections.ConfigDict | ml_collections.FrozenConfigDict
else:
    Array = Mesh = Config = typing.Any

PathLike = str | os.PathLike[str]
AxisNames = Sequence[str | None]  # logical axis names of one array, one for each dimension
PyTree = typing.Any  # nested dicts, lists and dataclasses whose leaves are arrays
Params = dict[str, typing.Any]  # a PyTree of a model's parameters, by module and parameter name
Batch = dict[str, typing.Any]  # arrays `[batch, length]` by name: tokens, targets, weights...
Record = dict[str, typing.Any]  # a row as plain data, what record.json holds
