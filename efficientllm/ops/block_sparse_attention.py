"""Block-sparse attention: each query reads the blocks of keys that it selected (MoBA, NSA).

Letters of this file: C choosers (query heads that choose together), r query heads a chooser, n blocks a query.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.ops import block_sparse_kernel
from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice


@flax.struct.dataclass
class SelectedBlocks:
    """Blocks of keys that each query reads, up to a last key.

    Args:
      start_BTCn: the first key of each block, negative where a query reads fewer than n; distinct for a query.
      last_BT: the last key that each query may read: itself, or in both directions the last of its document.
      size: keys of a block; a document's last block may reach past its end, beyond the last key of its queries.
    """

    start_BTCn: jax.Array
    last_BT: jax.Array
    size: int = flax.struct.field(pytree_node=False)

    def dense(self, key_length: int) -> jax.Array:
        """Returns the mask as a boolean array `[B, C, T, S]`, True where a query may read."""
        key_S = jnp.arange(key_length)
        start_BTCn1 = self.start_BTCn[..., None]
        in_block = (start_BTCn1 >= 0) & (key_S >= start_BTCn1) & (key_S < start_BTCn1 + self.size)
        mask_BTCS = jnp.any(in_block, -2) & (key_S <= self.last_BT[:, :, None, None])
        return jnp.swapaxes(mask_BTCS, 1, 2)


def attend_blocks(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, chosen: SelectedBlocks, kernel: str = "auto"
) -> jax.Array:
    """Computes scaled dot-product attention over selected blocks -> `[B, T, H, V]`; softmax is float32.

    C is a multiple of G, and H of C: query head h reads the blocks of chooser h // (H // C) and KV head h // (H // G).
    A query without a block gets zeros.

    Args:
      kernel: `auto` or a registered `block_kernel`.

    Raises UserError for a kernel that does not exist.
    """
    if kernel == "auto":
        kernel = choose(q_BTHK, k_BSGK, chosen)
    compute = lookup("block_kernel", kernel, where="block_kernel")
    kernel_choice.record_kernel("block_attention", kernel)
    choosers = chosen.start_BTCn.shape[2]
    k_BSCK, v_BSCV = (jnp.repeat(x, choosers // x.shape[2], axis=2) for x in (k_BSGK, v_BSGV))
    with jax.named_scope("attention"):
        return compute(q_BTHK, k_BSCK, v_BSCV, chosen)


def choose(q_BTHK: jax.Array, k_BSGK: jax.Array, chosen: SelectedBlocks) -> str:
    """Chooses the block kernel for these shapes."""
    if q_BTHK.shape[1] == 1:
        return "gathered"
    return "grouped" if k_BSGK.shape[1] > GROUPED_FROM else "masked"


GROUPED_FROM = 1024  # keys


@register("block_kernel", "masked")
def _masked(q_BTHK, k_BSCK, v_BSCV, chosen):
    """Computes all pairs of query and key, and masks those outside the blocks."""
    B, T, H, _ = q_BTHK.shape
    C = k_BSCK.shape[2]
    q_BTCrK = q_BTHK.reshape(B, T, C, H // C, -1)
    mask_BC1TS = chosen.dense(k_BSCK.shape[1])[:, :, None]
    weights_BCrTS = _softmax(jnp.einsum("btcrk,bsck->bcrts", q_BTCrK, k_BSCK, **_ACCUMULATE), mask_BC1TS, q_BTHK)
    y_BTCrV = jnp.einsum("bcrts,bscv->btcrv", weights_BCrTS.astype(v_BSCV.dtype), v_BSCV, **_ACCUMULATE)
    return y_BTCrV.reshape(B, T, H, -1).astype(q_BTHK.dtype)


@register("block_kernel", "gathered")
def _gathered(q_BTHK, k_BSCK, v_BSCV, chosen):
    """Gathers each query's blocks: the cost of a decoded token does not grow with the number of keys."""
    B, T, H, _ = q_BTHK.shape
    C = k_BSCK.shape[2]
    q_BTCrK = q_BTHK.reshape(B, T, C, H // C, -1)
    # The n blocks of L keys that a query reads become one axis of n L keys, which stands in place of S below.
    key_BTCnL = chosen.start_BTCn[..., None] + jnp.arange(chosen.size)
    readable = (chosen.start_BTCn[..., None] >= 0) & (key_BTCnL <= chosen.last_BT[:, :, None, None, None])
    key_BTCS, mask_BTC1S = key_BTCnL.reshape(B, T, C, -1), readable.reshape(B, T, C, 1, -1)
    batch, chooser = jnp.arange(B)[:, None, None, None], jnp.arange(C)[:, None]
    k_BTCSK, v_BTCSV = (x.at[batch, key_BTCS, chooser].get(mode="clip") for x in (k_BSCK, v_BSCV))
    weights_BTCrS = _softmax(jnp.einsum("btcrk,btcsk->btcrs", q_BTCrK, k_BTCSK, **_ACCUMULATE), mask_BTC1S, q_BTHK)
    y_BTCrV = jnp.einsum("btcrs,btcsv->btcrv", weights_BTCrS.astype(v_BSCV.dtype), v_BTCSV, **_ACCUMULATE)
    return y_BTCrV.reshape(B, T, H, -1).astype(q_BTHK.dtype)


_ACCUMULATE = {"preferred_element_type": jnp.float32}


def _softmax(scores, mask, q_BTHK):
    """Computes softmax over the last axis; zeros where every key is masked."""
    scores = jnp.where(mask, scores * q_BTHK.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(scores, -1), 0.0)


@register("block_kernel", "grouped")
def _grouped(q_BTHK, k_BSCK, v_BSCV, chosen):
    """Sorts queries by the block they read (`block_sparse_kernel`), under a mesh on each device for its rows and
    choosers: XLA cannot partition the loops over them, and would run all on every device."""
    operands = q_BTHK, k_BSCK, v_BSCV, chosen.start_BTCn, chosen.last_BT
    local = functools.partial(_grouped_local, chosen.size)
    mesh = sharding.current_mesh()
    if mesh is None:
        return local(*operands)
    spec = sharding.spec(("batch", None, "kv_heads", None), k_BSCK.shape, mesh)
    rows = P(spec[0] if chosen.last_BT.shape[0] == k_BSCK.shape[0] else None, None)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(*(spec,) * 4, rows), out_specs=spec, check_vma=False)
    return mapped(*operands)


def _grouped_local(size, q_BTHK, k_BSCK, v_BSCV, start_BTCn, last_BT):
    """Computes one device's rows and choosers."""
    B, T, H, K = q_BTHK.shape
    C, V = k_BSCK.shape[2], v_BSCV.shape[-1]

    def by_chooser(x_BTCx):
        return jnp.moveaxis(x_BTCx, 2, 1).reshape(B * C, x_BTCx.shape[1], *x_BTCx.shape[3:])

    last_bT = jnp.repeat(jnp.broadcast_to(last_BT, (B, T)), C, axis=0)
    y_bTrV = block_sparse_kernel.attend(
        by_chooser(q_BTHK.reshape(B, T, C, H // C, K)),
        by_chooser(k_BSCK),
        by_chooser(v_BSCV),
        by_chooser(start_BTCn),
        last_bT,
        size,
    )
    return jnp.moveaxis(y_bTrV.reshape(B, C, T, H // C, V), 1, 2).reshape(B, T, H, V)
