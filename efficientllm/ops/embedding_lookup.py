"""Looking tokens up in an embedding that lies over a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.weights import take


def look_up(embedding_VD, tokens_BT, dtype):
    """The tokens' rows of the table, which stays where it is.

    Each device looks up its own columns for all rows of its fsdp group; an all-to-all then trades columns for rows.
    Left to itself the partitioner gathers the whole table on some meshes; and on GPUs for one token of one row, whose
    lookup is made a slice before it is divided.
    """
    V, D = embedding_VD.shape
    vocab, width = sharding.count_shards("vocab", V), sharding.count_shards("embed", D)
    if tokens_BT.shape[1] == 1 and vocab > 1 and width == 1:
        return sharding.constrain(_divided(embedding_VD, tokens_BT, dtype), "batch", "length", None)
    x_BTD = take(embedding_VD, sharding.constrain(tokens_BT, "group_batch", "length")).astype(dtype)
    return sharding.constrain(sharding.constrain(x_BTD, "group_batch", "length", "embed"), "batch", "length", None)


def _divided(embedding_VD, tokens_BT, dtype):
    """Each device of `tensor` looks up the tokens whose rows it has; the others' are zeros to it."""

    def part(table_VD, tokens_BT):
        local_BT = tokens_BT - jax.lax.axis_index("tensor") * table_VD.shape[0]
        is_mine_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
        x_BTD = take(table_VD, jnp.where(is_mine_BT, local_BT, 0)).astype(dtype)
        return jax.lax.psum(jnp.where(is_mine_BT[..., None], x_BTD, 0), "tensor")

    mesh = sharding.current_mesh()
    rows = sharding.spec(("batch",), tokens_BT.shape[:1], mesh)[0]
    of_table = jax.tree.map(lambda array: sharding.spec(("vocab", None), array.shape, mesh), embedding_VD)
    divided = jax.shard_map(part, in_specs=(of_table, P(rows)), out_specs=P(rows), check_vma=False)
    return divided(embedding_VD, tokens_BT)
