"""Splash attention on TPUs: the Pallas kernel that JAX ships, under the mesh in scope."""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.runtime import kernel_choice

LANES = 128  # rows and columns of a block are multiples of it


def takes(mask: typing.Any, bias: typing.Callable | None) -> bool:
    """Tells whether the kernel supports these inputs: no state, no bias, no blocks of tokens.

    `mask` is an `ops.attention_mask.Mask`.
    """
    return mask.query_index_BT is None and bias is None and mask.order != "prefix"


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: typing.Any, scale: float) -> jax.Array:
    """Computes `ops.attention.attend` of inputs that it `takes` -> `[B, T, H, V]`; the kernel itself rejects others."""
    T = q_BTHK.shape[1]
    of_queries, of_keys = _segments(mask, *q_BTHK.shape[:2], k_BSGK.shape[1])
    operands = (q_BTHK * scale).astype(q_BTHK.dtype), k_BSGK, v_BSGV, of_queries, of_keys
    operands = *map(_pad, operands[:3]), *(_pad(segments, -1) for segments in operands[3:])
    local = functools.partial(_local, mask)
    mesh = sharding.current_mesh()
    if mesh is None:
        return local(None, *operands)[:, :T]
    # XLA cannot partition a Pallas kernel: shard_map gives each device its rows and heads.
    axes = [("batch", None, name, None) for name in ("heads", "kv_heads", "kv_heads")] + [("batch", None)] * 2
    specs = [sharding.spec(names, leaf.shape, mesh) for names, leaf in zip(axes, operands, strict=True)]
    split = specs[0][2] if specs[1][2] is None else None  # heads are sharded, KV heads are too few to be
    y_spec = P(*specs[0])
    mapped = jax.shard_map(
        functools.partial(local, split), mesh=mesh, in_specs=tuple(specs), out_specs=y_spec, check_vma=False
    )
    return mapped(*operands)[:, :T]


def _pad(x_BT, fill=0):
    """Fills the last block; queries and keys that fill it have a segment of their own."""
    missing = -x_BT.shape[1] % LANES
    return jnp.pad(x_BT, ((0, 0), (0, missing), *((0, 0),) * (x_BT.ndim - 2)), constant_values=fill)


def _segments(mask, B, T, S):
    """Returns the segments of queries and of keys."""
    of_keys = jnp.ones((B, S), jnp.int32) if mask.segments_BT is None else mask.segments_BT
    if mask.cross and mask.query_segments_BT is None:  # padding alone is not read
        return jnp.ones((B, T), jnp.int32), (of_keys > 0).astype(jnp.int32)
    return (of_keys if mask.query_segments_BT is None else mask.query_segments_BT), of_keys


def _local(mask, split, q_BTHK, k_BSGK, v_BSGV, of_queries, of_keys):
    """Computes one device's rows and heads; over the mesh axis `split` query heads are sharded, KV heads replicated."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, H = q_BTHK.shape[1:3]
    if split is not None:
        first = jax.lax.axis_index(split) * H
        of_query = (first + jnp.arange(H)) * k_BSGK.shape[2] // (H * jax.lax.axis_size(split))
        k_BSGK, v_BSGV = k_BSGK[:, :, of_query], v_BSGV[:, :, of_query]
    S = k_BSGK.shape[1]
    block_q, block_kv = (next(size for size in (512, 256, LANES) if length % size == 0) for length in (T, S))
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = {f"block_{name}": block_q if name.startswith("q") else block_kv for name in names}
    kernel = splash.make_splash_mha(
        _mask(mask, T, S, H),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=kernel_choice.platform() == "cpu",
    )
    heads_first = (jnp.swapaxes(leaf, 1, 2) for leaf in (q_BTHK, k_BSGK, v_BSGV))
    segments = splash.SegmentIds(q=of_queries, kv=of_keys)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)


def _mask(mask, T, S, H):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    causal = mask.order == "causal"
    if mask.window is None:
        head_mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    else:
        head_mask = masks.LocalMask((T, S), (mask.window - 1, 0 if causal else mask.window - 1), 0)
    return masks.MultiHeadMask([head_mask] * H)
