"""Attention of queries over keys: masks as values, and the kernel that computes it."""

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.ops import native, splash_attention
from efficientllm.ops.int8_kv_cache import Int8KVCache, as_array
from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice


@flax.struct.dataclass
class Mask:
    """Which keys a query may read: none after itself, none of another segment, none older than the window.

    Args:
      segments_BT: the document of each token of a packed row, 0 for padding; None when a row is one document.
      query_index_BT: the key index each query stands at; None when query t stands at key t (training, and prefill
        into an empty state).
      key_index_BS: the index each key stands at, negative where a slot is empty; None when key s stands at s.
      window: keys a query reads, itself included; None reads all.
      query_segments_BT: the document of each query, where queries are not all of the row's tokens.
    """

    segments_BT: jax.Array = None
    query_index_BT: jax.Array = None
    key_index_BS: jax.Array = None
    window: int = flax.struct.field(pytree_node=False, default=None)
    query_segments_BT: jax.Array = None

    @property
    def aligned(self):
        """Queries and keys are the same tokens."""
        return self.query_index_BT is None

    def dense(self, query_length, key_length):
        """The mask as a boolean array `[B or 1, T, S]`, True where a query may read."""
        return self.rows((0, query_length), (0, key_length))

    def rows(self, queries, keys):
        """`dense` for the queries and keys of two ranges `(start, stop)`."""
        distance_BTS = self.distance(queries, keys)
        mask_BTS = distance_BTS >= 0
        if self.window is not None:
            mask_BTS &= distance_BTS < self.window
        if self.key_index_BS is not None:
            mask_BTS &= self.key_index_BS[:, None, slice(*keys)] >= 0
        if self.segments_BT is not None:
            of_queries = self.segments_BT if self.query_segments_BT is None else self.query_segments_BT
            mask_BTS &= of_queries[:, slice(*queries), None] == self.segments_BT[:, None, slice(*keys)]
        return mask_BTS

    def distance(self, queries, keys):
        """How far behind its query each key stands, `[B or 1, T, S]`; negative after it."""
        query_BT = jnp.arange(*queries)[None] if self.aligned else self.query_index_BT[:, slice(*queries)]
        key_BS = jnp.arange(*keys)[None] if self.key_index_BS is None else self.key_index_BS[:, slice(*keys)]
        return query_BT[:, :, None] - key_BS[:, None, :]


@flax.struct.dataclass
class Context:
    """What every mixer of a forward pass shares.

    `positions_BT` restart at each segment. `mask` covers the row, or the state's slots when decoding. `memo` holds
    what mixers of earlier layers hand to later ones (`model.LM`). `reach_B` says how many tokens each row will have
    when its prompt is read, for positions that ask (`Position.by_length`); None: as many as the positions say.
    """

    positions_BT: jax.Array
    mask: Mask
    memo: dict = flax.struct.field(default_factory=dict)
    reach_B: jax.Array = None

    def rotate(self, position, x_BTHK):
        """Queries or keys of this pass with their positions."""
        if self.reach_B is None or not position.by_length:
            return position.rotate(x_BTHK, self.positions_BT)
        return position.rotate(x_BTHK, self.positions_BT, self.reach_B)

    @property
    def real_BT(self):
        """Which tokens are no padding; None where all are. What counts tokens, or lets them compete, asks this."""
        return None if self.mask.segments_BT is None else self.mask.segments_BT > 0

    @classmethod
    def packed(cls, positions_BT, segments_BT=None):
        """Training and evaluation: rows that may hold several documents."""
        return cls(positions_BT, Mask(segments_BT=segments_BT))

    @classmethod
    def decoding(cls, positions_BT, reach_B=None):
        """Prefill and decode: one document a row, token t of it in slot t of the state."""
        return cls(positions_BT, Mask(query_index_BT=positions_BT), reach_B=reach_B)


def attend(q_BTHK, k_BSGK, v_BSGV, mask, kernel="auto", bias=None, scale=None):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1) -> `[B, T, H, V]`.

    Softmax is float32. H is a multiple of G: query head h reads KV head h // (H // G). Keys and values may be those of
    a state of another type, or in int8 (`Int8KVCache`), and keys a pair that each hold a part of every key.

    Args:
      kernel: `auto` or a registered `attention_kernel`, for passes whose queries are the keys' tokens; over a state
        it is chosen.
      bias: what is added to the scores: `(mask, queries, keys) -> [B or 1, H, T, S]`, the ranges as in `Mask.rows`.
      scale: of the scores; None is K^-1/2.

    Raises UserError for a kernel that does not exist, or needs whole rows where the mesh divides them.
    """
    if kernel == "auto" or not mask.aligned:
        kernel = choose(q_BTHK, mask, bias)
    compute = lookup("attention_kernel", kernel, where="config.model.attention_kernel")
    if mask.aligned and kernel not in DIVIDED and sharding.count_shards("length", q_BTHK.shape[1]) > 1:
        raise UserError(
            f"config.model.attention_kernel = {kernel!r} needs whole rows, and the mesh axis sequence divides them; "
            "take 'auto'"
        )
    kernel_choice.record_kernel("attention", kernel)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if kernel != "ffi":
        parts = [as_array(part, q_BTHK.dtype) for part in _parts(k_BSGK)]
        k_BSGK = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
        v_BSGV = as_array(v_BSGV, q_BTHK.dtype)
    return compute(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale)


def _parts(keys):
    return keys if isinstance(keys, tuple) else (keys,)


def choose(q_BTHK, mask, bias=None):
    """The attention kernel for these shapes on the platform being compiled for."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    if mask.aligned and sharding.count_shards("length", T) > 1:
        return "gathered"
    if T == 1 and not mask.aligned and bias is None and native.is_usable():
        return "ffi"
    half = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    widest = 256 if kernel_choice.capability() >= (9, 0) else 128  # of heads in cuDNN, as JAX has it
    shaped = T % 2 == 0 and not K % 8 and widest >= K
    if kernel_choice.platform() == "gpu" and half and shaped and mask.aligned and bias is None:
        return "cudnn"
    if kernel_choice.platform() == "tpu" and splash_attention.takes(q_BTHK, mask, bias):
        return "splash"
    # Measured on CPUs: skipping the masked half in static chunks is 1.4x to 2x faster from two chunks on.
    if kernel_choice.platform() == "cpu" and mask.aligned and T > CHUNK:
        return "chunked"
    return "xla"


DIVIDED = ("xla", "gathered")  # kernels that take rows whose tokens lie on several devices
CHUNK = 64
MAX_CHUNKS = 32  # each chunk is compiled apart
GATHERED_CHUNK = 256


@register("attention_kernel", "xla")
def _xla(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    return _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, (0, q_BTHK.shape[1]), (0, k_BSGK.shape[1]))


@register("attention_kernel", "ffi")
def _ffi(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    if mask.aligned or q_BTHK.shape[1] > 1 or bias is not None or not native.is_usable():
        raise UserError(
            "config.model.attention_kernel = 'ffi' decodes one token a row on one CPU device, with positions that are "
            "no bias; 'auto' takes it wherever it can"
        )
    cached, scales = [*_parts(k_BSGK), v_BSGV], None
    if isinstance(v_BSGV, Int8KVCache):
        cached, scales = zip(*((leaf.values, leaf.scale[..., 0]) for leaf in cached), strict=True)
    *keys, values = cached
    B, S = values.shape[:2]
    mask_B1S = jnp.broadcast_to(mask.dense(1, S), (B, 1, S))
    y_BHV = native.attention(q_BTHK[:, 0], keys, values, mask_B1S[:, 0], scale, scales)
    return y_BHV[:, None].astype(q_BTHK.dtype)


@register("attention_kernel", "cudnn")
def _cudnn(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    V = v_BSGV.shape[-1]
    width = max(q_BTHK.shape[-1], V)  # it wants heads of one width; zeros change no score
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) for x in (q_BTHK, k_BSGK, v_BSGV))
    options = {"scale": scale, "implementation": "cudnn"}
    if mask.segments_BT is None:
        window = None if mask.window is None else (mask.window - 1, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, **options)
    else:
        mask_B1TS = mask.dense(q.shape[1], k.shape[1])[:, None]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, **options)
    return y[..., :V]


@register("attention_kernel", "splash")
def _splash(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    if not splash_attention.takes(q_BTHK, mask, bias):
        raise UserError(
            "config.model.attention_kernel = 'splash' needs rows of whole 128 tokens, positions that are no bias, and "
            "no decoding; 'auto' takes it wherever it can"
        )
    return splash_attention.attend(q_BTHK, k_BSGK, v_BSGV, mask, scale)


@register("attention_kernel", "chunked")
def _chunked(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Queries in static chunks, each over the keys it may reach: most of what is masked is never computed."""
    outputs = [
        _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, queries, keys)
        for queries, keys in _chunks(q_BTHK.shape[1], mask.window)
    ]
    return jnp.concatenate(outputs, axis=1)


@register("attention_kernel", "gathered")
def _gathered(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Queries stay where their tokens are; each device gathers the row's keys and values and reads all of them.

    A chunk of each device's queries at a time, whose scores the backward pass recomputes: no device holds scores of
    more than `GATHERED_CHUNK` queries. Masked pairs are computed. Letters: n devices, m chunks of L tokens on each.
    """
    (B, T, H, _), V, n = q_BTHK.shape, v_BSGV.shape[-1], sharding.count_shards("length", q_BTHK.shape[1])
    k_nBSGK, v_nBSGV = _gather(k_BSGK, n), _gather(v_BSGV, n)  # a copy of the row's keys and values on each device
    segments_mnBL = None
    L = next(size for size in range(min(T // n, GATHERED_CHUNK), 0, -1) if T // n % size == 0)

    def split(x_BT):
        """`[B, T, ...]` -> `[m, n, B, L, ...]`: `map` runs over m chunks, the devices hold n."""
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], n, -1, L, *x_BT.shape[2:]), 0, 2).swapaxes(0, 1)

    if mask.segments_BT is not None:
        segments_mnBL = split(mask.segments_BT)
        mask = mask.replace(segments_BT=sharding.constrain(mask.segments_BT, "batch", None))  # once, not for each chunk

    def on_device(chunk, k_BSGK, v_BSGV):
        q_BLHK, index_BL, segments_BL = chunk
        of_chunk = mask.replace(query_index_BT=index_BL, query_segments_BT=segments_BL)
        return _dense(q_BLHK, k_BSGK, v_BSGV, of_chunk, bias, scale, (0, L), (0, T))

    on_devices = jax.checkpoint(jax.vmap(on_device, spmd_axis_name="sequence"))
    q_mnBLHK = sharding.constrain(split(q_BTHK), None, "length", "batch", None, "heads", None)
    chunks = q_mnBLHK, split(jnp.arange(T)[None]), segments_mnBL
    y_mnBLHV = jax.lax.map(lambda chunk: on_devices(chunk, k_nBSGK, v_nBSGV), chunks)
    y_BTHV = jnp.moveaxis(y_mnBLHV, 2, 0).swapaxes(1, 2).reshape(B, T, H, V)  # by way of [B, n, m, L, H, V]
    return sharding.constrain(y_BTHV, "batch", "length", "heads", None)


def _gather(x_BSG, n):
    """A copy of keys or values for each of n devices: their gradients are added up at the end, once for all chunks.

    Pinned before: the partitioner would gather what they are made of, float32 under a rotation.
    """
    x_BSG = sharding.constrain(x_BSG, "batch", "length", "kv_heads", None)
    return sharding.constrain(jnp.broadcast_to(x_BSG, (n, *x_BSG.shape)), "length", "batch", None, "kv_heads", None)


def _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, queries, keys):
    """The queries of one range over the keys of another, every pair of them."""
    q, k, v = q_BTHK[:, slice(*queries)], k_BSGK[:, slice(*keys)], v_BSGV[:, slice(*keys)]
    mask_B1TS = mask.rows(queries, keys)[:, None]
    bias_BHTS = None if bias is None else bias(mask, queries, keys)
    if q.shape[-1] == v.shape[-1]:
        return jax.nn.dot_product_attention(q, k, v, bias=bias_BHTS, mask=mask_B1TS, scale=scale, implementation="xla")
    return _unequal_heads(q, k, v, bias_BHTS, mask_B1TS, scale)


def _unequal_heads(q_BTHK, k_BSGK, v_BSGV, bias_BHTS, mask_B1TS, scale):
    """`jax.nn.dot_product_attention` for values that are not as wide as keys."""
    B, T, H, K = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(B, T, k_BSGK.shape[2], -1, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1) * scale
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    weights_BHTS = jax.nn.softmax(jnp.where(mask_B1TS, scores_BHTS, jnp.finfo(jnp.float32).min), -1)
    weights = weights_BHTS.astype(v_BSGV.dtype).reshape(scores.shape)
    return jnp.einsum("bgrts,bsgv->btgrv", weights, v_BSGV).reshape(B, T, H, -1)


def _chunks(length, window=None):
    """`[((start, stop) of queries, (start, stop) of the keys they may reach)]`."""
    size = max(CHUNK, -(-length // MAX_CHUNKS))
    starts = range(0, length, size)
    reach = length if window is None else window - 1
    return [((s, min(length, s + size)), (max(0, s - reach), min(length, s + size))) for s in starts]


def causal_pairs(length, window=None):
    """Query-key pairs per head of a causal row: half of the square, and of the window's where it is narrower."""
    window = length if window is None else min(window, length)
    return window * window / 2 + (length - window) * window


def executed_pairs(kernel, length, window=None):
    """Query-key pairs per head that `kernel` computes for a causal row of `length` tokens."""
    if kernel == "chunked":
        return sum((queries[1] - queries[0]) * (keys[1] - keys[0]) for queries, keys in _chunks(length, window))
    return length * length
