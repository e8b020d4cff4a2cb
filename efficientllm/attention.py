"""Attention of queries over keys: masks as values, and the kernel that computes it."""

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import kernels
from efficientllm.registry import lookup, register


@flax.struct.dataclass
class Mask:
    """Which keys a query may read: none after itself, none of another segment.

    Args:
      segments_BT: the document of each token of a packed row; None when a row is one document.
      query_index_BT: the key index each query stands at; None when query t stands at key t (training, and prefill
        into an empty state).
    """

    segments_BT: jax.Array = None
    query_index_BT: jax.Array = None

    def dense(self, query_length, key_length):
        """The mask as a boolean array `[B or 1, T, S]`, True where a query may read."""
        return self.rows(0, query_length, key_length)

    def rows(self, start, stop, key_length):
        """`dense` for the queries start..stop over the first `key_length` keys."""
        aligned = self.query_index_BT is None
        index_BT = jnp.arange(start, stop)[None] if aligned else self.query_index_BT[:, start:stop]
        mask_BTS = index_BT[:, :, None] >= jnp.arange(key_length)
        if self.segments_BT is None:
            return mask_BTS
        return mask_BTS & (self.segments_BT[:, start:stop, None] == self.segments_BT[:, None, :key_length])


@flax.struct.dataclass
class Context:
    """What every mixer of a forward pass shares.

    `positions_BT` restart at each segment. `mask` covers the row, or the state's slots when decoding.
    """

    positions_BT: jax.Array
    mask: Mask

    @classmethod
    def packed(cls, positions_BT, segments_BT=None):
        """Training and evaluation: rows that may hold several documents."""
        return cls(positions_BT, Mask(segments_BT=segments_BT))

    @classmethod
    def decoding(cls, positions_BT):
        """Prefill and decode: one document a row, token t of it in slot t of the state."""
        return cls(positions_BT, Mask(query_index_BT=positions_BT))


def attend(q_BTHK, k_BSGK, v_BSGK, mask, kernel="auto"):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1) -> `[B, T, H, K]`.

    Softmax is float32. H is a multiple of G: query head h reads KV head h // (H // G).
    `kernel` is `auto` or a registered `attention_kernel`. Raises UserError for a kernel that does not exist.
    """
    if kernel == "auto":
        kernel = choose(q_BTHK, k_BSGK, mask)
    compute = lookup("attention_kernel", kernel, where="config.model.attention_kernel")
    kernels.note("attention", kernel)
    return compute(q_BTHK, k_BSGK, v_BSGK, mask)


def choose(q_BTHK, k_BSGK, mask):
    """The attention kernel for these shapes on the platform being compiled for."""
    aligned = mask.query_index_BT is None  # queries and keys are the same tokens
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    half = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    if kernels.platform() == "gpu" and half and aligned and K % 8 == 0 and K <= 128 and T % 2 == 0:
        return "cudnn"
    # Measured on CPUs: skipping the masked half in static chunks is 1.4x to 2x faster from two chunks on.
    if kernels.platform() == "cpu" and aligned and T > CHUNK:
        return "chunked"
    return "xla"


CHUNK = 64
MAX_CHUNKS = 32  # each chunk is compiled apart


@register("attention_kernel", "xla")
def _xla(q_BTHK, k_BSGK, v_BSGK, mask, implementation="xla"):
    if mask.segments_BT is None and mask.query_index_BT is None:
        return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation=implementation)
    mask_B1TS = mask.dense(q_BTHK.shape[1], k_BSGK.shape[1])[:, None]
    return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_B1TS, implementation=implementation)


@register("attention_kernel", "cudnn")
def _cudnn(q_BTHK, k_BSGK, v_BSGK, mask):
    return _xla(q_BTHK, k_BSGK, v_BSGK, mask, implementation="cudnn")


@register("attention_kernel", "chunked")
def _chunked(q_BTHK, k_BSGK, v_BSGK, mask):
    """Queries in static chunks, each over the keys up to its end: most of the masked half is never computed."""
    outputs = []
    for start, stop in _chunks(q_BTHK.shape[1]):
        mask_B1TS = mask.rows(start, stop, stop)[:, None]
        q, k, v = q_BTHK[:, start:stop], k_BSGK[:, :stop], v_BSGK[:, :stop]
        outputs.append(jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, implementation="xla"))
    return jnp.concatenate(outputs, axis=1)


def _chunks(length):
    size = max(CHUNK, -(-length // MAX_CHUNKS))
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def executed_pairs(kernel, length):
    """Query-key pairs per head that `kernel` computes for a causal row of `length` tokens."""
    if kernel == "chunked":
        return sum((stop - start) * stop for start, stop in _chunks(length))
    return length * length
