"""RWKV-7 recurrence (Peng et al. 2025, arXiv:2503.14456, Section 4), token by token and in chunks.

A head's memory is a matrix S `[K, V]`, keys by values. Token t removes what S holds under the key kappa_t (a unit
vector), as far as beta_t says, and adds the pair of k_t and v_t; r_t reads:

    S_t = diag(w_t) S_{t-1} - beta_t (kappa_t^T S_{t-1}) + k_t v_t^T,    y_t = S_t^T r_t

Letters of this file: C chunks, Q tokens of a chunk; a key is K wide, a value V.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from efficientllm.ops.rematerialization import name_recurrence
from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice

# Measured on CPUs, against 32. Factored decays reach exp(-CHUNK log w), which float32 holds for log w >= -0.61.
CHUNK = 16
# Tokens whose intermediates the backward pass holds at a time; between spans it saves the memory.
SPAN = 512
# Accelerators would round the operands of float32 products, and a memory adds up over the whole document.
exact_products = functools.partial(jax.default_matmul_precision, "float32")


@struct.dataclass
class Tokens:
    """Inputs of the recurrence for each token, float32 `[B, T, H, K]` (v: V wide); log_w is in [-0.61, 0]."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array
    kappa: jax.Array
    beta: jax.Array


def recur(
    tokens: Tokens, starts_BT: jax.Array, memory_BHKV: jax.Array | None = None, kernel: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over a row -> `(y [B, T, H, V], the memory after its last token)`.

    Args:
      starts_BT: True where a document starts, with an empty memory.
      memory_BHKV: the memory before the row; None is zeros.
      kernel: `auto` or a registered `rwkv_kernel`.

    Raises UserError for a kernel that does not exist.
    """
    B, T, H, K = tokens.k.shape
    if kernel == "auto":
        kernel = choose(T)
    compute = lookup("rwkv_kernel", kernel, where="rwkv_kernel")
    kernel_choice.record_kernel("rwkv", kernel)
    if memory_BHKV is None:
        memory_BHKV = jnp.zeros((B, H, K, tokens.v.shape[-1]), jnp.float32)
    with exact_products(), jax.named_scope("scan"):
        y_BTHV, memory_BHKV = compute(tokens, starts_BT, memory_BHKV)
        return name_recurrence(y_BTHV), memory_BHKV


def choose(length: int) -> str:
    """Chooses the RWKV kernel for rows of `length` on the platform being compiled for.

    Measured on CPUs: steps take 0.3x to 0.5x of the chunks' time, but their gradient, which saves the memory at every
    token, 1.5x to 13x. On other platforms a step is too little work for one kernel launch (not measured).
    """
    if length == 1:
        return "sequential"
    return "split" if kernel_choice.platform() == "cpu" else "chunked"


def executed_flops(kernel: str, length: int, K: int, V: int) -> int:
    """Counts forward FLOPs of the matrix products that `kernel` computes for one head of a row of `length` tokens."""
    kernel = choose(length) if kernel == "auto" else kernel
    if kernel != "chunked":
        return 4 * length * K * V
    Q = CHUNK
    merges = Q.bit_length() - 2
    pairs = (2 * Q) ** 2 * K + 2 * Q * Q * V
    solve = 2 * merges * Q**3 + 2 * Q * Q * (K + V)
    return 2 * -(-length // Q) * (pairs + solve + 4 * Q * K * V)


@register("rwkv_kernel", "sequential")
def _sequential(tokens, starts_BT, memory_BHKV):
    """Computes token by token. Its gradient saves the memory at every token, so it is for passes without one."""

    def step(memory_BHKV, inputs):
        token, starts_B = inputs
        memory_BHKV = jnp.where(starts_B[:, None, None, None], 0, memory_BHKV)
        removed_BHV = jnp.einsum("bhk,bhkv->bhv", token.kappa, memory_BHKV)
        memory_BHKV = (
            jnp.exp(token.log_w)[..., None] * memory_BHKV
            - token.beta[..., None] * removed_BHV[..., None, :]
            + token.k[..., None] * token.v[..., None, :]
        )
        return memory_BHKV, jnp.einsum("bhk,bhkv->bhv", token.r, memory_BHKV)

    by_token = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (tokens, starts_BT))
    if starts_BT.shape[1] == 1:
        memory_BHKV, y_BHV = step(memory_BHKV, jax.tree.map(lambda leaf: leaf[0], by_token))
        return y_BHV[:, None], memory_BHKV
    memory_BHKV, y_TBHV = jax.lax.scan(step, memory_BHKV, by_token)
    return jnp.moveaxis(y_TBHV, 0, 1), memory_BHKV


@register("rwkv_kernel", "chunked")
def _chunked(tokens, starts_BT, memory_BHKV):
    """Computes chunk by chunk, by matrix products, and recomputes spans of chunks in the backward pass.

    A row of one span saves its intermediates, which are linear in the number of tokens.
    """
    T = starts_BT.shape[1]
    if SPAN >= T:
        return _span(tokens, starts_BT, memory_BHKV)
    spans = -(-T // SPAN)

    def split(leaf_BT):
        """`[B, T, ...]` -> `[spans, B, SPAN, ...]`, padded with tokens that change no memory."""
        leaf_BT = jnp.pad(leaf_BT, ((0, 0), (0, spans * SPAN - T)) + ((0, 0),) * (leaf_BT.ndim - 2))
        return jnp.moveaxis(leaf_BT.reshape(leaf_BT.shape[0], spans, SPAN, *leaf_BT.shape[2:]), 1, 0)

    def compute(memory_BHKV, inputs):
        y_BTHV, memory_BHKV = jax.checkpoint(_span)(*inputs, name_recurrence(memory_BHKV))
        return memory_BHKV, y_BTHV

    memory_BHKV, y = jax.lax.scan(compute, memory_BHKV, jax.tree.map(split, (tokens, starts_BT)))
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], spans * SPAN, *y.shape[3:])[:, :T], memory_BHKV


def _span(tokens, starts_BT, memory_BHKV):
    """Computes one span.

    Inside a chunk every memory is written with the one before the chunk, S, so that what each token removes,
    u_t = kappa_t^T S_{t-1}, solves a triangular system (the WY form: Bischof & Van Loan 1987; Yang et al. 2024,
    arXiv:2406.06484, without decay):

        u_t + sum_{j<t} <kappa_t, beta_j>_w u_j = <kappa_t, S>_w + sum_{j<t} <kappa_t, k_j>_w v_j

    with <., .>_w decayed over the tokens between. Tokens of different documents make no pair.
    """
    B, T, H, _ = tokens.k.shape
    K, V = memory_BHKV.shape[2:]
    chunks, starts_CBQ = _split_chunks(tokens, starts_BT)
    document_CBQ = jnp.cumsum(starts_CBQ, -1)  # 0 continues the memory before the chunk
    log_decay = jnp.cumsum(chunks.log_w, -2)
    left, right = _factors(chunks, log_decay)
    pairs = jnp.where(_reads(document_CBQ), jnp.einsum("...ik,...jk->...ij", left, right), 0)
    left = jnp.where(jnp.tile(document_CBQ, 2)[:, :, None, :, None] == 0, left, 0)

    # pairs [2Q, 2Q]: rows kappa, r; columns beta, k. u = kappa S + pairs_k v - pairs_beta u is solved by `inverse`, and
    # y = r S + pairs_k v - pairs_beta u. `rest` holds both right sides as [coefficients of S (K) | constants (V)].
    rest = jnp.concatenate([left, pairs[..., CHUNK:] @ chunks.v], -1)
    of_u = inverse(pairs[..., :CHUNK, :CHUNK]) @ rest[..., :CHUNK, :]
    of_y = rest[..., CHUNK:, :] - pairs[..., CHUNK:, :CHUNK] @ of_u
    solution = jnp.concatenate([of_u, of_y], -2)
    decay, writes = _carried(chunks, log_decay, document_CBQ)

    def step(memory_BHKV, inputs):
        by_memory, constants, v, decay, writes = inputs
        u_and_y = by_memory @ memory_BHKV + constants
        written = jnp.concatenate([u_and_y[..., :CHUNK, :], v], -2)
        memory_BHKV = decay[..., None] * memory_BHKV + jnp.einsum("bhqk,bhqv->bhkv", writes, written)
        return memory_BHKV, u_and_y[..., CHUNK:, :]

    memory_BHKV, y_CBHQV = jax.lax.scan(
        step, memory_BHKV, (solution[..., :K], solution[..., K:], chunks.v, decay, writes)
    )
    return jnp.transpose(y_CBHQV, (1, 0, 3, 2, 4)).reshape(B, -1, H, V)[:, :T], memory_BHKV


def _split_chunks(tokens, starts_BT):
    """Splits `[B, T, H, K] -> [C, B, H, Q, K]`, padded with tokens that change no memory; starts `[C, B, Q]`."""
    B, T = starts_BT.shape
    padding = -T % CHUNK

    def split(leaf):
        leaf = jnp.pad(leaf, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return jnp.transpose(leaf.reshape(B, -1, CHUNK, *leaf.shape[2:]), (1, 0, 3, 2, 4))

    starts_BT = jnp.pad(starts_BT, ((0, 0), (0, padding)))
    return jax.tree.map(split, tokens), jnp.moveaxis(starts_BT.reshape(B, -1, CHUNK), 1, 0)


def _factors(chunks, log_decay):
    """Scales rows `[kappa; r]` by the decay since the chunk's start, `[beta; k]` by its inverse: their products then
    have the decay over the tokens between."""
    grown = jnp.exp(-log_decay)
    left = [chunks.kappa * jnp.exp(log_decay - chunks.log_w), chunks.r * jnp.exp(log_decay)]
    return jnp.concatenate(left, -2), jnp.concatenate([chunks.beta * grown, chunks.k * grown], -2)


def _reads(document_CBQ):
    """Masks pairs of `[kappa; r]` and `[beta; k]`, `[C, B, 1, 2Q, 2Q]`: kappa reads earlier tokens, r its own too."""
    same_CBQQ = document_CBQ[..., :, None] == document_CBQ[..., None, :]
    index = jnp.arange(CHUNK)
    rows = [same_CBQQ & (index[:, None] > index), same_CBQQ & (index[:, None] >= index)]
    return jnp.tile(jnp.concatenate(rows, -2), 2)[:, :, None]


def _carried(chunks, log_decay, document_CBQ):
    """Computes a memory's decay in a chunk, `[C, B, H, K]`, and the keys that write `[u; v]`, `[C, B, H, 2Q, K]`."""
    last = log_decay[..., -1:, :]
    decay = jnp.where((document_CBQ == document_CBQ[..., -1:])[:, :, None, :, None], jnp.exp(last - log_decay), 0)
    memory_decay = jnp.where(document_CBQ[..., -1][:, :, None, None] == 0, jnp.exp(last[..., 0, :]), 0)
    return memory_decay, jnp.concatenate([-chunks.beta * decay, chunks.k * decay], -2)


@jax.custom_vjp
def inverse(strict: jax.Array) -> jax.Array:
    """Computes `(I + strict)^-1` of strictly lower triangular matrices `[..., Q, Q]`, Q a power of two.

    Blocks on the diagonal are inverted in pairs, [[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]: products that
    every platform is fast at, and as stable as substitution, which a power series of `strict` is not.
    """
    Q = strict.shape[-1]
    block = jnp.arange(Q)
    inverted = jnp.eye(Q) - jnp.where(block[:, None] // 2 == block // 2, strict, 0)
    size = 2
    while size < Q:
        row, column = (block // size)[:, None], block // size
        below = jnp.where((row // 2 == column // 2) & (row != column), strict, 0)
        inverted = inverted - inverted @ below @ inverted
        size *= 2
    return inverted


def _inverse_forward(strict):
    inverted = inverse(strict)
    return inverted, inverted


def _inverse_backward(inverted, cotangent):
    transposed = jnp.swapaxes(inverted, -1, -2)
    with exact_products():
        return (-(transposed @ cotangent @ transposed),)


inverse.defvjp(_inverse_forward, _inverse_backward)


@register("rwkv_kernel", "split")
@jax.custom_vjp
def _split(tokens, starts_BT, memory_BHKV):
    """Runs `sequential` without a gradient, `chunked` under one."""
    return _sequential(tokens, starts_BT, memory_BHKV)


def _split_forward(tokens, starts_BT, memory_BHKV):
    with exact_products():
        return jax.vjp(lambda tokens, memory: _chunked(tokens, starts_BT, memory), tokens, memory_BHKV)


def _split_backward(pullback, cotangents):
    tokens, memory_BHKV = pullback(cotangents)
    return tokens, None, memory_BHKV


_split.defvjp(_split_forward, _split_backward)
