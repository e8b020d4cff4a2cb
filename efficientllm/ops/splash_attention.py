"""Splash attention on TPUs: the Pallas kernel that JAX ships, under the mesh in scope."""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.runtime import kernel_choice

LANES = 128  # rows and columns of a block are multiples of it


def takes(q_BTHK: jax.Array, mask: typing.Any, bias: typing.Callable | None) -> bool:
    """Tells whether the kernel supports these inputs: queries aligned with keys, no bias, whole blocks.

    `mask` is an `ops.attention.Mask`.
    """
    return mask.aligned and bias is None and q_BTHK.shape[1] % LANES == 0


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: typing.Any, scale: float) -> jax.Array:
    """Computes `ops.attention.attend` of inputs that it `takes` -> `[B, T, H, V]`; the kernel itself rejects others."""
    segments_BT = mask.segments_BT
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32)
    local = functools.partial(_local, mask.window)
    operands = (q_BTHK * scale).astype(q_BTHK.dtype), k_BSGK, v_BSGV, segments_BT
    mesh = sharding.current_mesh()
    if mesh is None:
        return local(None, *operands)
    # XLA cannot partition a Pallas kernel: shard_map gives each device its rows and heads.
    axes = [("batch", None, name, None) for name in ("heads", "kv_heads", "kv_heads")] + [("batch", None)]
    specs = [sharding.spec(names, leaf.shape, mesh) for names, leaf in zip(axes, operands, strict=True)]
    split = specs[0][2] if specs[1][2] is None else None  # heads are sharded, KV heads are too few to be
    y_spec = P(*specs[0])
    mapped = jax.shard_map(
        functools.partial(local, split), mesh=mesh, in_specs=tuple(specs), out_specs=y_spec, check_vma=False
    )
    return mapped(*operands)


def _local(window, split, q_BTHK, k_BSGK, v_BSGV, segments_BT):
    """Computes one device's rows and heads; over the mesh axis `split` query heads are sharded, KV heads replicated."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, H = q_BTHK.shape[1:3]
    if split is not None:
        first = jax.lax.axis_index(split) * H
        of_query = (first + jnp.arange(H)) * k_BSGK.shape[2] // (H * jax.lax.axis_size(split))
        k_BSGK, v_BSGV = k_BSGK[:, :, of_query], v_BSGV[:, :, of_query]
    block = next(size for size in (512, 256, LANES) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        _mask(T, H, window),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=kernel_choice.platform() == "cpu",
    )
    heads_first = (jnp.swapaxes(leaf, 1, 2) for leaf in (q_BTHK, k_BSGK, v_BSGV))
    segments = splash.SegmentIds(q=segments_BT, kv=segments_BT)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)


def _mask(T, H, window):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    head_mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    return masks.MultiHeadMask([head_mask] * H)
