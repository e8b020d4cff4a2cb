"""Kernels of scaled dot-product attention, registered as `attention_kernel`; `attention.attend` chooses among them.

Each takes `(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale)` and returns `[B, T, H, V]`, for every order of the mask, or
raises UserError.
"""

import typing

import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.errors import FieldError
from efficientllm.ops import cudnn_attention, native, splash_attention
from efficientllm.ops.attention_bias import TableBias
from efficientllm.ops.attention_mask import Mask
from efficientllm.ops.dot_product_attention import dot_product_attention
from efficientllm.ops.int8_kv_cache import Int8KVCache
from efficientllm.ops.native import flash
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice

Cached: typing.TypeAlias = (
    jax.Array | Int8KVCache | tuple
)  # keys or values of a row or a state; a tuple holds channels of the keys

DIVIDED = ("xla", "gathered")  # kernels that accept rows whose tokens are sharded
GATHERED_CHUNK = 256


@register("attention_kernel", "xla")
def _xla(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    return _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, (0, q_BTHK.shape[1]), (0, k_BSGK.shape[1]))


@register("attention_kernel", "ffi")
def _ffi(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    if mask.query_index_BT is None or q_BTHK.shape[1] > 1 or bias is not None or not native.is_usable():
        raise FieldError(
            "attention_kernel",
            "decodes one token a row on one CPU device, with positions that are no bias; take 'auto'",
            "ffi",
        )
    cached, scales = [*key_leaves(k_BSGK), v_BSGV], None
    if isinstance(v_BSGV, Int8KVCache):
        cached, scales = zip(*((leaf.values, _scale(leaf)) for leaf in cached), strict=True)
    *keys, values = cached
    B, S = values.shape[:2]
    mask_B1S = jnp.broadcast_to(mask.dense(1, S), (B, 1, S))
    y_BHV = native.attention(q_BTHK[:, 0], keys, values, mask_B1S[:, 0], scale, scales)
    return y_BHV[:, None].astype(q_BTHK.dtype)


def _scale(cache):
    """Returns the scales `[B, S, G]` of an int8 cache, `[B, S, G, K]` or of one KV head `[B, S, K]`."""
    return cache.scale[..., 0] if cache.scale.ndim == 4 else cache.scale


@register("attention_kernel", "flash")
def _flash(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    if not (takes_flash(q_BTHK, mask, bias) and flash.is_usable()):
        raise FieldError(
            "attention_kernel",
            "needs one CPU device with AVX2, float32 or bfloat16, a causal or bidirectional order, positions that "
            "are no bias, and no decoding; take 'auto'",
            "flash",
        )
    segments_BT = mask.segments_BT
    if segments_BT is not None:
        segments_BT = jnp.broadcast_to(segments_BT, q_BTHK.shape[:2])
    is_causal, window = mask.order == "causal", mask.window or 0
    return flash.attention(q_BTHK, k_BSGK, v_BSGV, segments_BT, segments_BT, float(scale), is_causal, window)


def takes_flash(q_BTHK: jax.Array, mask: Mask, bias: typing.Callable | None) -> bool:
    """Tells whether `flash` honours the mask: of whole rows, where every query reads a key.

    Queries of segments other than their tokens', such as padding that reads text, may read none.
    """
    is_float = q_BTHK.dtype in (jnp.float32, jnp.bfloat16)
    in_order = mask.order in ("causal", "bidirectional") and mask.query_index_BT is None and mask.key_index_BS is None
    is_whole = mask.query_segments_BT is None and (mask.aligned or mask.reads_all)
    return is_float and in_order and bias is None and is_whole


@register("attention_kernel", "cudnn")
def _cudnn(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    return cudnn_attention.attend(q_BTHK, k_BSGK, v_BSGV, mask, scale)


@register("attention_kernel", "splash")
def _splash(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    if not splash_attention.takes(mask, bias):
        raise FieldError(
            "attention_kernel",
            "needs positions that are no bias, a causal or bidirectional order, and no decoding; take 'auto'",
            "splash",
        )
    return splash_attention.attend(q_BTHK, k_BSGK, v_BSGV, mask, scale)


@register("attention_kernel", "chunked")
def _chunked(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Computes queries in chunks, each over the keys in its reach.

    Chunks of a causal row are static: most masked scores are never computed.
    """
    if mask.order != "causal":
        return _looped(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale)
    outputs = [
        _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, queries, keys)
        for queries, keys in mask.chunks(q_BTHK.shape[1])
    ]
    return jnp.concatenate(outputs, axis=1)


@register("attention_kernel", "looped")
def _in_loops(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Computes queries in chunks of loops, whose scores the backward pass recomputes: a tile of them is in memory."""
    if mask.order != "causal" or not mask.aligned:
        return _looped(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale)
    T, outputs = q_BTHK.shape[1], []
    for queries, keys in mask.loops(T):
        of_queries = jax.tree.map(lambda x_BT, at=slice(*queries): x_BT[:, at], mask.queries(T))
        segments_BS = None if mask.segments_BT is None else mask.segments_BT[:, slice(*keys)]
        part = mask.replace(
            **of_queries,
            segments_BT=segments_BS,
            key_index_BS=jnp.arange(*keys)[None],
            shift=jnp.array(queries[0] - keys[0]),
        )
        q, (k, v) = q_BTHK[:, slice(*queries)], (x[:, slice(*keys)] for x in (k_BSGK, v_BSGV))
        outputs.append(_looped(q, k, v, part, bias, scale))
    return jnp.concatenate(outputs, 1)


def _looped(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Computes m chunks of L queries in a loop, each over W keys; the backward pass recomputes their scores.

    XLA for CPUs holds the scores of all static chunks together in the backward pass, rematerialized or not.
    """
    (B, T, H, _), S = q_BTHK.shape, k_BSGK.shape[1]
    m, L, W = mask.loop(T, S)
    bias = _by_row(bias, B)
    shift = jnp.array(0) if mask.aligned else mask.shift

    def split(x_BT):
        """`[B, T, ...]` -> `[m, B, L, ...]`, with zeros after the last query."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, m * L - T), *((0, 0),) * (x_BT.ndim - 2)))
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], m, L, *x_BT.shape[2:]), 1, 0)

    # The gradients of keys and values are summed over the chunks in the dtype of what enters the loop.
    wide_keys, wide_values = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k_BSGK, v_BSGV))

    def compute(chunk):
        number, start, q_BLHK, queries = chunk

        def take(x_BS):
            return x_BS if W == S else jax.lax.dynamic_slice_in_dim(x_BS, start, W, 1)

        k_BWGK, v_BWGV = take(wide_keys).astype(k_BSGK.dtype), take(wide_values).astype(v_BSGV.dtype)
        keys = jax.tree.map(take, {"segments_BT": mask.segments_BT, "blocks_BT": mask.blocks_BT})
        if mask.key_index_BS is None:
            keys["key_index_BS"] = (start + jnp.arange(W))[None]
        else:
            keys["key_index_BS"] = take(mask.key_index_BS)
        keys["shift"] = None if shift is None else shift + number * L - start
        return _dense(q_BLHK, k_BWGK, v_BWGV, mask.replace(**queries, **keys), bias, scale, (0, L), (0, W))

    q_mBLHK = sharding.constrain(split(q_BTHK), None, "batch", None, "heads", None)
    start_m = jnp.clip(jnp.arange(m) * L - (W - L) // 2, 0, S - W)
    chunks = jnp.arange(m), start_m, q_mBLHK, jax.tree.map(split, mask.queries(T))
    y_mBLHV = jax.lax.map(jax.checkpoint(compute), chunks)
    return jnp.moveaxis(y_mBLHV, 0, 1).reshape(B, m * L, H, -1)[:, :T]


@register("attention_kernel", "gathered")
def _gathered(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Shards queries over devices, and all-gathers the row's keys and values.

    Each device computes a chunk of its queries at a time, and the backward pass recomputes the scores: no device holds
    scores of more than `GATHERED_CHUNK` queries. Masked pairs are computed. n devices, m chunks of L tokens on each.
    """
    (B, T, H, _), V, n = q_BTHK.shape, v_BSGV.shape[-1], sharding.count_shards("length", q_BTHK.shape[1])
    keys = (0, k_BSGK.shape[1])
    # A copy of the row's keys and values on each device.
    k_nBSGK, v_nBSGV = (_gather(x, n, None if mask.cross else "length") for x in (k_BSGK, v_BSGV))
    L = next(size for size in range(min(T // n, GATHERED_CHUNK), 0, -1) if T // n % size == 0)

    def split(x_BT):
        """`[B, T, ...]` -> `[m, n, B, L, ...]`: `map` runs over m chunks, the devices hold n."""
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], n, -1, L, *x_BT.shape[2:]), 0, 2).swapaxes(0, 1)

    queries = jax.tree.map(split, mask.queries(T))
    whole = {"segments_BT": mask.segments_BT, "blocks_BT": mask.blocks_BT}  # gathered once, not for each chunk
    mask = mask.replace(**{key: x if x is None else sharding.constrain(x, "batch", None) for key, x in whole.items()})

    bias, in_order = _by_row(bias, B), mask.aligned

    def on_device(chunk, k_BSGK, v_BSGV):
        q_BLHK, queries = chunk
        shift = queries["query_index_BT"][0, 0] if in_order else None
        return _dense(q_BLHK, k_BSGK, v_BSGV, mask.replace(**queries, shift=shift), bias, scale, (0, L), keys)

    on_devices = jax.checkpoint(jax.vmap(on_device, spmd_axis_name="sequence"))
    q_mnBLHK = sharding.constrain(split(q_BTHK), None, "length", "batch", None, "heads", None)
    y_mnBLHV = jax.lax.map(lambda chunk: on_devices(chunk, k_nBSGK, v_nBSGV), (q_mnBLHK, queries))
    y_BTHV = jnp.moveaxis(y_mnBLHV, 2, 0).swapaxes(1, 2).reshape(B, T, H, V)  # by way of [B, n, m, L, H, V]
    return sharding.constrain(y_BTHV, "batch", "length", "heads", None)


def _by_row(bias, rows):
    """Returns a bias whose gradient stays with the rows of the batch, where it has one."""
    return bias.by_row(rows) if isinstance(bias, TableBias) else bias


def _gather(x_BSG, n, axis):
    """All-gathers keys or values to n devices; their gradients are summed once, after all chunks.

    The constraint before it makes XLA gather the keys themselves and not the float32 operands of their rotation.
    `axis` is the logical axis of S.
    """
    x_BSG = sharding.constrain(x_BSG, "batch", axis, "kv_heads", None)
    return sharding.constrain(jnp.broadcast_to(x_BSG, (n, *x_BSG.shape)), "length", "batch", None, "kv_heads", None)


def _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, queries, keys):
    """Computes all pairs of a range of queries and a range of keys."""
    q, k, v = q_BTHK[:, slice(*queries)], k_BSGK[:, slice(*keys)], v_BSGV[:, slice(*keys)]
    mask_B1TS = mask.rows(queries, keys)[:, None]
    bias_BHTS = None if bias is None else bias(mask, queries, keys)
    in_state = mask.query_index_BT is not None
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    by_kv_head = (in_state or is_half) and kernel_choice.platform() == "cpu" and sharding.is_alone()
    return dot_product_attention(q, k, v, bias_BHTS, mask_B1TS, scale, by_kv_head)


def key_leaves(keys: Cached) -> tuple:
    """Returns the arrays of keys, which hold their channels in order."""
    return keys if isinstance(keys, tuple) else (keys,)
