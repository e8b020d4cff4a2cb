"""Selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752, Algorithm 2), sequential or associative.

Letters of this file: C channels, n state size of a channel. For each channel,
`h_t = keep_t exp(step_t A) h_(t-1) + step_t x_t b_t` and `y_t = c_t . h_t`; keep is 0 at the first token of a document.
No form holds `[B, T, C, n]`: states are saved at the edges of chunks, and recomputed in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from efficientllm.ops.rematerialization import name_recurrence
from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice
from efficientllm.sharding import count_shards

# States at their edges are saved: of 128 tokens, an eighth of what the outputs of these tokens take.
CHUNK = {"sequential": 64, "associative": 128}


def selective_scan(
    x_BTC: jax.Array,
    step_BTC: jax.Array,
    A_Cn: jax.Array,
    b_BTn: jax.Array,
    c_BTn: jax.Array,
    keep_BT: jax.Array,
    h_BCn: jax.Array,
    kernel: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Scans rows from the state `h_BCn` -> `(y_BTC, the state after the last token)`, float32.

    `kernel` is `auto` or a registered `scan_kernel`. Raises UserError for a kernel that does not exist.
    """
    if kernel == "auto":
        kernel = "sequential" if kernel_choice.platform() == "cpu" else "associative"
    within = lookup("scan_kernel", kernel, where="scan_kernel")
    kernel_choice.record_kernel("scan", kernel)
    T = x_BTC.shape[1]
    size = min(T, CHUNK[kernel])  # one token, in decoding, is one step
    chunks = -(-T // size)
    by_time = (step_BTC * x_BTC, step_BTC, b_BTn, c_BTn, keep_BT)

    # Tokens that fill the last chunk have a step of 0: they leave the state as it is.
    def fill(leaf, value):
        return jnp.pad(leaf, ((0, 0), (0, chunks * size - T)) + ((0, 0),) * (leaf.ndim - 2), constant_values=value)

    filled = [fill(leaf, value) for leaf, value in zip(by_time, (0, 0, 0, 0, 1), strict=True)]
    split = [jnp.moveaxis(leaf.reshape(leaf.shape[0], chunks, size, *leaf.shape[2:]), 0, 2) for leaf in filled]
    within = jax.checkpoint(functools.partial(within, A_Cn))
    with jax.named_scope("scan"):
        h_BCn, y = jax.lax.scan(lambda h_BCn, chunk: within(name_recurrence(h_BCn), chunk), h_BCn, split)
    y_BTC = jnp.moveaxis(y.reshape(chunks * size, *y.shape[2:]), 0, 1)[:, :T]
    return name_recurrence(y_BTC), h_BCn


@register("scan_kernel", "sequential")
def _sequential(A_Cn, h_BCn, chunk):
    """Scans token by token: the fewest operations, and the fastest form on CPUs."""

    def step(h_BCn, token):
        input_BC, step_BC, b_Bn, c_Bn, keep_B = token
        decay_BCn = jnp.exp(step_BC[..., None] * A_Cn) * keep_B[:, None, None]
        h_BCn = decay_BCn * h_BCn + input_BC[..., None] * b_Bn[:, None]
        return h_BCn, jnp.sum(h_BCn * c_Bn[:, None], -1)

    # XLA for CPUs (0.10.2) compiles the gradient of eight tokens in a row wrongly where a mesh of tensor alone shards
    # the channels over four or more devices: the loss differs in the third digit (tests/test_meshes.py).
    return jax.lax.scan(step, h_BCn, chunk, unroll=8 if count_shards("channels", h_BCn.shape[1]) == 1 else 1)


@register("scan_kernel", "associative")
def _associative(A_Cn, h_BCn, chunk):
    """Scans a chunk in a number of rounds logarithmic in its length, for accelerators."""
    input_TBC, step_TBC, b_TBn, c_TBn, keep_TB = chunk
    decay_TBCn = jnp.exp(step_TBC[..., None] * A_Cn) * keep_TB[..., None, None]
    input_TBCn = input_TBC[..., None] * b_TBn[:, :, None]

    def after(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    decay_TBCn, h_TBCn = jax.lax.associative_scan(after, (decay_TBCn, input_TBCn))
    h_TBCn = h_TBCn + decay_TBCn * h_BCn
    return h_TBCn[-1], jnp.sum(h_TBCn * c_TBn[:, :, None], -1)
