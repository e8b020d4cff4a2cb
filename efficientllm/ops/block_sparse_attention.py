"""Attention of queries over blocks of keys that each query chose.

Letters of this file: C choosers (query heads that choose together), R query heads a chooser, n blocks a query.
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
    """The blocks of keys that each query reads, up to the key it stands at.

    start_BTCn: the key a block starts at; negative where a query reads fewer than n blocks. A query's are distinct.
    index_BT: the key each query stands at.
    size: keys of a block; the last of a document may reach past its end, where no query of the document stands.
    """

    start_BTCn: jax.Array
    index_BT: jax.Array
    size: int = flax.struct.field(pytree_node=False)

    def dense(self, key_length):
        """The mask as a boolean array `[B, C, T, S]`, True where a query may read."""
        key_S = jnp.arange(key_length)
        start_BTCn1 = self.start_BTCn[..., None]
        in_block = (start_BTCn1 >= 0) & (key_S >= start_BTCn1) & (key_S < start_BTCn1 + self.size)
        mask_BTCS = jnp.any(in_block, -2) & (key_S <= self.index_BT[:, :, None, None])
        return jnp.swapaxes(mask_BTCS, 1, 2)


def attend_blocks(q_BTHK, k_BSGK, v_BSGV, chosen, kernel="auto"):
    """Scaled dot-product attention over the chosen blocks -> `[B, T, H, V]`; softmax is float32.

    Choosers are a multiple of the G KV heads, query heads one of the choosers: query head h follows chooser
    h // (H // C) and reads KV head h // (H // G). A query without a block gets zeros.

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
    return compute(q_BTHK, k_BSCK, v_BSCV, chosen)


def choose(q_BTHK, k_BSGK, chosen):
    """The kernel for these shapes."""
    if q_BTHK.shape[1] == 1:
        return "gathered"
    return "grouped" if k_BSGK.shape[1] > GROUPED_FROM else "masked"


GROUPED_FROM = 1024  # keys


@register("block_kernel", "masked")
def _masked(q_BTHK, k_BSCK, v_BSCV, chosen):
    """Every pair of query and key, those that are not to be read masked."""
    B, T, H, _ = q_BTHK.shape
    C = k_BSCK.shape[2]
    q_BTCRK = q_BTHK.reshape(B, T, C, H // C, -1)
    mask_BC1TS = chosen.dense(k_BSCK.shape[1])[:, :, None]
    weights_BCRTS = _softmax(jnp.einsum("btcrk,bsck->bcrts", q_BTCRK, k_BSCK, **_ACCUMULATE), mask_BC1TS, q_BTHK)
    y_BTCRV = jnp.einsum("bcrts,bscv->btcrv", weights_BCRTS.astype(v_BSCV.dtype), v_BSCV, **_ACCUMULATE)
    return y_BTCRV.reshape(B, T, H, -1).astype(q_BTHK.dtype)


@register("block_kernel", "gathered")
def _gathered(q_BTHK, k_BSCK, v_BSCV, chosen):
    """Each query's blocks laid side by side: what a token costs in decoding does not grow with the keys there are."""
    B, T, H, _ = q_BTHK.shape
    C = k_BSCK.shape[2]
    q_BTCRK = q_BTHK.reshape(B, T, C, H // C, -1)
    key_BTCnL = chosen.start_BTCn[..., None] + jnp.arange(chosen.size)
    readable = (chosen.start_BTCn[..., None] >= 0) & (key_BTCnL <= chosen.index_BT[:, :, None, None, None])
    key_BTCS, mask_BTC1S = key_BTCnL.reshape(B, T, C, -1), readable.reshape(B, T, C, 1, -1)
    batch, chooser = jnp.arange(B)[:, None, None, None], jnp.arange(C)[:, None]
    k_BTCSK, v_BTCSV = (x.at[batch, key_BTCS, chooser].get(mode="clip") for x in (k_BSCK, v_BSCV))
    weights_BTCRS = _softmax(jnp.einsum("btcrk,btcsk->btcrs", q_BTCRK, k_BTCSK, **_ACCUMULATE), mask_BTC1S, q_BTHK)
    y_BTCRV = jnp.einsum("btcrs,btcsv->btcrv", weights_BTCRS.astype(v_BSCV.dtype), v_BTCSV, **_ACCUMULATE)
    return y_BTCRV.reshape(B, T, H, -1).astype(q_BTHK.dtype)


_ACCUMULATE = {"preferred_element_type": jnp.float32}


def _softmax(scores, mask, q_BTHK):
    """Over the last axis; zeros where nothing may be read."""
    scores = jnp.where(mask, scores * q_BTHK.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(scores, -1), 0.0)


@register("block_kernel", "grouped")
def _grouped(q_BTHK, k_BSCK, v_BSCV, chosen):
    """Queries sorted by the block they read: see `grouped_attention`. Under a mesh each device is given its rows and
    choosers: the compiler cannot split loops over them, and would run all on every device."""
    operands = q_BTHK, k_BSCK, v_BSCV, chosen.start_BTCn, chosen.index_BT
    local = functools.partial(_grouped_local, chosen.size)
    mesh = sharding.current_mesh()
    if mesh is None:
        return local(*operands)
    spec = sharding.spec(("batch", None, "kv_heads", None), k_BSCK.shape, mesh)
    rows = P(spec[0] if chosen.index_BT.shape[0] == k_BSCK.shape[0] else None, None)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(*(spec,) * 4, rows), out_specs=spec, check_vma=False)
    return mapped(*operands)


def _grouped_local(size, q_BTHK, k_BSCK, v_BSCV, start_BTCn, index_BT):
    """One device's rows and choosers."""
    B, T, H, K = q_BTHK.shape
    C, V = k_BSCK.shape[2], v_BSCV.shape[-1]

    def by_chooser(x_BTCx):
        return jnp.moveaxis(x_BTCx, 2, 1).reshape(B * C, x_BTCx.shape[1], *x_BTCx.shape[3:])

    index_NT = jnp.repeat(jnp.broadcast_to(index_BT, (B, T)), C, axis=0)
    y_NTRV = block_sparse_kernel.attend(
        by_chooser(q_BTHK.reshape(B, T, C, H // C, K)),
        by_chooser(k_BSCK),
        by_chooser(v_BSCV),
        by_chooser(start_BTCn),
        index_NT,
        size,
    )
    return jnp.moveaxis(y_NTRV.reshape(B, C, T, H // C, V), 1, 2).reshape(B, T, H, V)
