"""The selective scan of Mamba (arXiv:2312.00752, Algorithm 2) in two forms.

Letters: B batch, T length, C channels, N state of a channel. For each channel,
`h_t = keep_t exp(step_t A) h_(t-1) + step_t x_t b_t` and `y_t = c_t . h_t`; keep is 0 at the first token of a document.
No form holds `[B, T, C, N]`: states are kept at the edges of chunks, and made again for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice
from efficientllm.sharding import count_shards

CHUNK = {"sequential": 64, "associative": 32}


def selective_scan(x_BTC, step_BTC, A_CN, b_BTN, c_BTN, keep_BT, h_BCN, kernel="auto"):
    """`(y_BTC, the state after the last token)`, float32. `kernel` is `auto` or a registered `scan_kernel`."""
    if kernel == "auto":
        kernel = "sequential" if kernel_choice.platform() == "cpu" else "associative"
    within = lookup("scan_kernel", kernel, where="scan_kernel")
    kernel_choice.record_kernel("scan", kernel)
    T = x_BTC.shape[1]
    size = min(T, CHUNK[kernel])  # one token, in decoding, is one step
    chunks = -(-T // size)
    by_time = (step_BTC * x_BTC, step_BTC, b_BTN, c_BTN, keep_BT)
    # Tokens that fill the last chunk have a step of 0: they leave the state as it is.
    fill = lambda leaf, value: jnp.pad(  # noqa: E731
        leaf, ((0, 0), (0, chunks * size - T)) + ((0, 0),) * (leaf.ndim - 2), constant_values=value
    )
    filled = [fill(leaf, value) for leaf, value in zip(by_time, (0, 0, 0, 0, 1), strict=True)]
    split = [jnp.moveaxis(leaf.reshape(leaf.shape[0], chunks, size, *leaf.shape[2:]), 0, 2) for leaf in filled]
    h_BCN, y = jax.lax.scan(jax.checkpoint(functools.partial(within, A_CN)), h_BCN, split)
    return jnp.moveaxis(y.reshape(chunks * size, *y.shape[2:]), 0, 1)[:, :T], h_BCN


@register("scan_kernel", "sequential")
def _sequential(A_CN, h_BCN, chunk):
    """A token after the other: the fewest operations, and the fastest form on CPUs."""

    def one(h_BCN, token):
        input_BC, step_BC, b_BN, c_BN, keep_B = token
        decay_BCN = jnp.exp(step_BC[..., None] * A_CN) * keep_B[:, None, None]
        h_BCN = decay_BCN * h_BCN + input_BC[..., None] * b_BN[:, None]
        return h_BCN, jnp.sum(h_BCN * c_BN[:, None], -1)

    # XLA for CPUs (0.10.2) compiles the gradient of eight tokens in a row wrongly where a mesh of tensor alone divides
    # the channels by four or more: the loss differs in the third digit (tests/test_meshes.py).
    return jax.lax.scan(one, h_BCN, chunk, unroll=8 if count_shards("channels", h_BCN.shape[1]) == 1 else 1)


@register("scan_kernel", "associative")
def _associative(A_CN, h_BCN, chunk):
    """All tokens of a chunk in a number of rounds that grows with its logarithm, for accelerators."""
    input_TBC, step_TBC, b_TBN, c_TBN, keep_TB = chunk
    decay_TBCN = jnp.exp(step_TBC[..., None] * A_CN) * keep_TB[..., None, None]
    input_TBCN = input_TBC[..., None] * b_TBN[:, :, None]
    after = lambda first, second: (second[0] * first[0], second[0] * first[1] + second[1])  # noqa: E731
    decay_TBCN, h_TBCN = jax.lax.associative_scan(after, (decay_TBCN, input_TBCN))
    h_TBCN = h_TBCN + decay_TBCN * h_BCN
    return h_TBCN[-1], jnp.sum(h_TBCN * c_TBN[:, :, None], -1)
