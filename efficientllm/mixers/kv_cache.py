"""KV cache: one slot a token or a ring buffer of the last tokens, in the activation dtype, float16 or int8."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efficientllm.errors import FieldError, did_you_mean
from efficientllm.mixers.base import State
from efficientllm.ops.attention import Mask
from efficientllm.ops.int8_kv_cache import Int8KVCache
from efficientllm.weights import activation_dtype

Shape = tuple[int, ...]
Leaf = Any  # a jax.Array `[B, S, ...]` or an Int8KVCache of that shape
KINDS = ("activation", "bfloat16", "float16", "int8")


def slots(length: int, window: int | None = None) -> int:
    """Counts the slots of a cache for `length` tokens; a ring buffer has at most `window`."""
    return length if window is None else min(length, window)


def dtype(kind: str, precision: str) -> jnp.dtype:
    """Returns the dtype of slots of a cache of `kind`. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise FieldError("kv_cache", f"is none of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}", kind)
    return activation_dtype(precision) if kind == "activation" else jnp.dtype(kind)


def empty(shapes: Mapping[str, Shape], batch: int, slots: int, dtype: jnp.dtype) -> State:
    """Allocates `{name: zeros [B, S, *shape]}`; leaves are `Int8KVCache` where `dtype` is int8."""
    zeros = {name: jnp.zeros((batch, slots, *shape), dtype) for name, shape in shapes.items()}
    if dtype != jnp.int8:
        return zeros
    return {name: Int8KVCache(leaf, jnp.zeros((*leaf.shape[:-1], 1))) for name, leaf in zeros.items()}


def slot_bytes(shapes: Mapping[str, Shape], dtype: jnp.dtype) -> int:
    """Counts the bytes of one slot of `empty`; an int8 leaf has a float32 scale for each head."""
    scales = 4 if dtype == jnp.int8 else 0
    return sum(math.prod(shape) * dtype.itemsize + math.prod(shape[:-1]) * scales for shape in shapes.values())


def extend(
    state: State | None, new: dict[str, jax.Array], mask: Mask, positions_BT: jax.Array
) -> tuple[tuple[Leaf, ...], Mask, State | None]:
    """Writes the tokens of `new` into the cache.

    Args:
      state: `{name: [B, S, ...]}`, or None in training.
      new: `{name: [B, T, ...]}` of the tokens at `positions_BT`, which are consecutive in each row.
      mask: the mask of the forward pass. With a window the cache is a ring buffer.

    Returns `(leaves that queries read, in the order of new; the mask over their slots; the new state)`.
    """
    if state is None:
        return tuple(new.values()), mask, None
    new = {name: _as(state[name], leaf) for name, leaf in new.items()}
    if mask.window is None:
        state = {name: write(state[name], leaf, positions_BT[:, 0]) for name, leaf in new.items()}
        return tuple(state.values()), mask, state
    return _extend_ring(state, new, mask, positions_BT)


def _as(cache, new):
    return Int8KVCache.of(new) if isinstance(cache, Int8KVCache) else new.astype(cache.dtype)


def write(cache_BS: Leaf, new_BT: Leaf, start_B: jax.Array) -> Leaf:
    """Writes each row's tokens into the slots from `start_B` on."""
    update = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice_in_dim(cache, new, start, 0))
    return jax.tree.map(lambda cache, new: update(cache, new, start_B), cache_BS, new_BT)


def _extend_ring(state, new, mask, positions_BT):
    """Writes tokens into a ring buffer: token p is in slot p mod S until token p + S replaces it."""
    S, T = jax.tree.leaves(state)[0].shape[1], positions_BT.shape[1]
    last_B1 = positions_BT[:, -1:]
    if T == 1:
        state = {name: write(state[name], leaf, positions_BT[:, 0] % S) for name, leaf in new.items()}
        return tuple(state.values()), mask.replace(key_index_BS=_ring_positions(last_B1, S)), state
    # A query may read tokens whose slots later tokens of this pass replace. So queries read the old ring and the new
    # tokens side by side, S + T keys, and the new ring is gathered from both: a slot whose token is new comes from
    # S + its place among the new tokens, another slot from itself.
    old_BS = _ring_positions(positions_BT[:, :1] - 1, S)
    read = jax.tree.map(lambda old, leaf: jnp.concatenate([old, leaf], 1), state, new)
    mask = mask.replace(key_index_BS=jnp.concatenate([old_BS, positions_BT], 1))
    now_BS = _ring_positions(last_B1, S)
    source_BS = jnp.where(now_BS >= positions_BT[:, :1], S + now_BS - positions_BT[:, :1], jnp.arange(S))
    take = jax.vmap(lambda leaf, index: leaf[index])
    return tuple(read.values()), mask, jax.tree.map(lambda leaf: take(leaf, source_BS), read)


def _ring_positions(last_B1, S):
    """Computes the token in each slot once token `last` is written: `[B, S]`, negative where a slot is empty."""
    return last_B1 - (last_B1 - jnp.arange(S)) % S
