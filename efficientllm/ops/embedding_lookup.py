"""Embedding lookup under a mesh, without an all-gather of the table."""

import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.weights import take


def look_up(embedding_VD: typing.Any, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Looks up the embeddings of tokens -> `[B, T, D]` in `dtype`; the table, an array or a `Weight`, stays sharded.

    Each device looks up its columns of the table for all tokens of its fsdp group. An all-to-all then exchanges
    columns for rows of the batch. XLA's partitioner alone would all-gather the table on some meshes. On GPUs it would
    do so for one token of one row, because it turns that lookup into a slice before it partitions it.
    """
    V, D = embedding_VD.shape
    vocab, width = sharding.count_shards("vocab", V), sharding.count_shards("embed", D)
    if tokens_BT.shape[1] == 1 and vocab > 1 and width == 1:
        return sharding.constrain(_look_up_by_vocab(embedding_VD, tokens_BT, dtype), "batch", "length", None)
    x_BTD = take(embedding_VD, sharding.constrain(tokens_BT, "group_batch", "length")).astype(dtype)
    return sharding.constrain(sharding.constrain(x_BTD, "group_batch", "length", "embed"), "batch", "length", None)


def _look_up_by_vocab(embedding_VD, tokens_BT, dtype):
    """Looks up on each device of `tensor` the tokens whose rows it holds, zeros for others; sums over devices."""

    def local(table_VD, tokens_BT):
        local_BT = tokens_BT - jax.lax.axis_index("tensor") * table_VD.shape[0]
        is_mine_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
        x_BTD = take(table_VD, jnp.where(is_mine_BT, local_BT, 0)).astype(dtype)
        return jax.lax.psum(jnp.where(is_mine_BT[..., None], x_BTD, 0), "tensor")

    mesh = sharding.current_mesh()
    rows = sharding.spec(("batch",), tokens_BT.shape[:1], mesh)[0]
    table_specs = jax.tree.map(lambda array: sharding.spec(("vocab", None), array.shape, mesh), embedding_VD)
    lookup = jax.shard_map(local, in_specs=(table_specs, P(rows)), out_specs=P(rows), check_vma=False)
    return lookup(embedding_VD, tokens_BT)
