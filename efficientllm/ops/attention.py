"""Scaled dot-product attention: masks, the context that mixers share, and the choice of a kernel."""

import typing

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.errors import UserError
from efficientllm.ops import native, splash_attention
from efficientllm.ops.dot_product_attention import dot_product_attention
from efficientllm.ops.int8_kv_cache import Int8KVCache, as_array
from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice

Range = tuple[int, int]  # (start, stop) of queries or keys
Cached: typing.TypeAlias = (
    jax.Array | Int8KVCache | tuple
)  # keys or values of a row or a state; a tuple holds channels of the keys


@flax.struct.dataclass
class Mask:
    """Attention mask: a query reads no key after itself, of another segment, or older than the window.

    Args:
      segments_BT: the document of each token of a packed row, 0 for padding; None where a row is one document.
      query_index_BT: the key index of each query; None where query t has index t (training, prefill without a state).
      key_index_BS: the index of each key, negative for an empty slot; None where key s has index s.
      window: how many keys a query reads, itself included; None reads all.
      query_segments_BT: the document of each query, where queries are not all of the row's tokens.
    """

    segments_BT: jax.Array | None = None
    query_index_BT: jax.Array | None = None
    key_index_BS: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    query_segments_BT: jax.Array | None = None

    @property
    def aligned(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query_index_BT is None

    def dense(self, query_length: int, key_length: int) -> jax.Array:
        """Returns the mask as a boolean array `[B or 1, T, S]`, True where a query may read."""
        return self.rows((0, query_length), (0, key_length))

    def rows(self, queries: Range, keys: Range) -> jax.Array:
        """Returns `dense` for the queries and keys of two ranges."""
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

    def distance(self, queries: Range, keys: Range) -> jax.Array:
        """Computes the index of each query less that of each key, `[B or 1, T, S]`."""
        query_BT = jnp.arange(*queries)[None] if self.aligned else self.query_index_BT[:, slice(*queries)]
        key_BS = jnp.arange(*keys)[None] if self.key_index_BS is None else self.key_index_BS[:, slice(*keys)]
        return query_BT[:, :, None] - key_BS[:, None, :]


@flax.struct.dataclass
class Context:
    """Context of a forward pass, which all mixers share.

    `positions_BT` restart at each segment. `mask` covers the row, or the state's slots in decoding. `memo` holds arrays
    by name that mixers of earlier layers hand to later ones (`Mixer.init_memo`). `reach_B` is the length of each row
    after its prompt, for positions with `Position.by_length`; None takes it from the positions.
    """

    positions_BT: jax.Array
    mask: Mask
    memo: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    reach_B: jax.Array | None = None
    replace: typing.ClassVar[typing.Callable]  # flax.struct makes it: a copy with other values of the fields named

    def rotate(self, position: typing.Any, x_BTHK: jax.Array) -> jax.Array:
        """Rotates queries or keys of this pass by a `positions.base.Position`."""
        if self.reach_B is None or not position.by_length:
            return position.rotate(x_BTHK, self.positions_BT)
        return position.rotate(x_BTHK, self.positions_BT, self.reach_B)

    @property
    def real_BT(self) -> jax.Array | None:
        """False for padding tokens, True for others; None without padding."""
        return None if self.mask.segments_BT is None else self.mask.segments_BT > 0

    @classmethod
    def packed(cls, positions_BT: jax.Array, segments_BT: jax.Array | None = None) -> "Context":
        """Makes the context of training and evaluation: rows that may hold several documents."""
        return cls(positions_BT, Mask(segments_BT=segments_BT))

    @classmethod
    def decoding(cls, positions_BT: jax.Array, reach_B: jax.Array | None = None) -> "Context":
        """Makes the context of prefill and decode: one document a row, its token t in slot t of the state."""
        return cls(positions_BT, Mask(query_index_BT=positions_BT), reach_B=reach_B)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: Cached,
    v_BSGV: Cached,
    mask: Mask,
    kernel: str = "auto",
    bias: typing.Callable | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1) -> `[B, T, H, V]`.

    Softmax is float32. H is a multiple of G: query head h reads KV head h // (H // G). V is the width of a value.

    Args:
      k_BSGK, v_BSGV: arrays of any dtype, or of a KV cache; keys may be two of them, their first and last channels.
      kernel: `auto` or a registered `attention_kernel`; a pass over a state ignores it.
      bias: `(mask, queries, keys) -> [B or 1, H, T, S]`, added to the scores; the ranges are those of `Mask.rows`.
      scale: factor of the scores; None is K^-1/2.

    Raises UserError for a kernel that does not exist, or that needs whole rows where the mesh shards them.
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
        keys = [as_array(leaf, q_BTHK.dtype) for leaf in _key_leaves(k_BSGK)]
        k_BSGK = keys[0] if len(keys) == 1 else jnp.concatenate(keys, -1)
        v_BSGV = as_array(v_BSGV, q_BTHK.dtype)
    return compute(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale)


def _key_leaves(keys):
    return keys if isinstance(keys, tuple) else (keys,)


def choose(q_BTHK: jax.Array, mask: Mask, bias: typing.Callable | None = None) -> str:
    """Chooses the attention kernel for these shapes and the platform being compiled for."""
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


DIVIDED = ("xla", "gathered")  # kernels that accept rows whose tokens are sharded
CHUNK = 64
MAX_CHUNKS = 32  # each chunk is compiled separately
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
    cached, scales = [*_key_leaves(k_BSGK), v_BSGV], None
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
    """Computes queries in static chunks, each over the keys in its reach: most masked scores are never computed."""
    outputs = [
        _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, queries, keys)
        for queries, keys in _chunks(q_BTHK.shape[1], mask.window)
    ]
    return jnp.concatenate(outputs, axis=1)


@register("attention_kernel", "gathered")
def _gathered(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale):
    """Shards queries over devices, and all-gathers the row's keys and values.

    Each device computes a chunk of its queries at a time, and the backward pass recomputes the scores: no device holds
    scores of more than `GATHERED_CHUNK` queries. Masked pairs are computed. n devices, m chunks of L tokens on each.
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
    """All-gathers keys or values to n devices; their gradients are summed once, after all chunks.

    The constraint before it makes XLA gather the keys themselves and not the float32 operands of their rotation.
    """
    x_BSG = sharding.constrain(x_BSG, "batch", "length", "kv_heads", None)
    return sharding.constrain(jnp.broadcast_to(x_BSG, (n, *x_BSG.shape)), "length", "batch", None, "kv_heads", None)


def _dense(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale, queries, keys):
    """Computes all pairs of a range of queries and a range of keys."""
    q, k, v = q_BTHK[:, slice(*queries)], k_BSGK[:, slice(*keys)], v_BSGV[:, slice(*keys)]
    mask_B1TS = mask.rows(queries, keys)[:, None]
    bias_BHTS = None if bias is None else bias(mask, queries, keys)
    return dot_product_attention(q, k, v, bias_BHTS, mask_B1TS, scale)


def _chunks(length, window=None):
    """Lists `(range of queries, range of the keys in their reach)`."""
    size = max(CHUNK, -(-length // MAX_CHUNKS))
    starts = range(0, length, size)
    reach = length if window is None else window - 1
    return [((s, min(length, s + size)), (max(0, s - reach), min(length, s + size))) for s in starts]


def causal_pairs(length: int, window: int | None = None) -> float:
    """Counts query-key pairs per head of a causal row, half of the square; or of a window."""
    window = length if window is None else min(window, length)
    return window * window / 2 + (length - window) * window


def executed_pairs(kernel: str, length: int, window: int | None = None) -> int:
    """Counts query-key pairs per head that `kernel` computes for a causal row of `length` tokens."""
    if kernel == "chunked":
        return sum((queries[1] - queries[0]) * (keys[1] - keys[0]) for queries, keys in _chunks(length, window))
    return length * length
