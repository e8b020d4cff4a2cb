"""State-space duality of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, Section 6, Listing 1), in chunks or by token.

For each head `S_t = keep_t exp(step_t A) S_(t-1) + step_t x_t b_t` and `y_t = S_t c_t`; keep is False at the first
token of a document. Letters of this file: those of `mixers.mamba2`, Z chunks of Q tokens.
"""

import functools

import jax
import jax.numpy as jnp

from efficientllm.ops.rematerialization import name_recurrence

SPAN = 512  # tokens whose intermediates the backward pass holds at a time; between spans it saves the memory


@jax.named_scope("scan")
def step(
    x_BTHP: jax.Array,
    step_BTH: jax.Array,
    A_H: jax.Array,
    b_BTJN: jax.Array,
    c_BTJN: jax.Array,
    keep_BT: jax.Array,
    memory_BHPN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes one token by the recurrence -> `(y [B, 1, H, P], memory)`; `chunk` is not used."""
    heads = x_BTHP.shape[2] // b_BTJN.shape[2]
    b_BHN, c_BHN = (jnp.repeat(leaf[:, 0], heads, 1) for leaf in (b_BTJN, c_BTJN))
    decay_BH = jnp.exp(step_BTH[:, 0] * A_H) * keep_BT[:, :1]
    input_BHP = step_BTH[:, 0, :, None] * x_BTHP[:, 0]
    memory_BHPN = decay_BH[..., None, None] * memory_BHPN + input_BHP[..., None] * b_BHN[:, :, None]
    return jnp.sum(memory_BHPN * c_BHN[:, :, None], -1)[:, None], memory_BHPN


@jax.named_scope("scan")
def chunked(
    x_BTHP: jax.Array,
    step_BTH: jax.Array,
    A_H: jax.Array,
    b_BTJN: jax.Array,
    c_BTJN: jax.Array,
    keep_BT: jax.Array,
    memory_BHPN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes a row by matrix products of chunks of `chunk` tokens -> `(y [B, T, H, P], memory)`, float32.

    A row longer than `SPAN` is computed in spans of whole chunks, whose intermediates the backward pass recomputes.
    """
    T = x_BTHP.shape[1]
    size = max(1, SPAN // chunk) * chunk
    by_time = (x_BTHP, step_BTH, b_BTJN, c_BTJN, keep_BT)
    if size >= T:
        y_BTHP, memory_BHPN = _span(A_H, chunk, memory_BHPN, by_time)
        return name_recurrence(y_BTHP), memory_BHPN
    spans = -(-T // size)

    def split(leaf, value):
        """`[B, T, ...]` -> `[spans, B, size, ...]`, filled with tokens that leave the memory as it is."""
        fill = ((0, 0), (0, spans * size - T)) + ((0, 0),) * (leaf.ndim - 2)
        filled = jnp.pad(leaf, fill, constant_values=value)
        return jnp.moveaxis(filled.reshape(leaf.shape[0], spans, size, *leaf.shape[2:]), 1, 0)

    filled = tuple(split(leaf, value) for leaf, value in zip(by_time, (0, 0, 0, 0, True), strict=True))

    def compute(memory_BHPN, span):
        y_BTHP, memory_BHPN = jax.checkpoint(functools.partial(_span, A_H, chunk))(name_recurrence(memory_BHPN), span)
        return memory_BHPN, y_BTHP

    memory_BHPN, y = jax.lax.scan(compute, memory_BHPN, filled)
    y_BTHP = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], spans * size, *y.shape[3:])[:, :T]
    return name_recurrence(y_BTHP), memory_BHPN


def _span(A_H, chunk, memory_BHPN, by_time):
    """Computes one span."""
    x_BTHP, step_BTH, b_BTJN, c_BTJN, keep_BT = by_time
    B, T, H, P = x_BTHP.shape
    J, N = b_BTJN.shape[2:]
    Q, Z = _chunks(T, chunk)

    def split(leaf):
        filled = jnp.pad(leaf, ((0, 0), (0, Z * Q - T)) + ((0, 0),) * (leaf.ndim - 2))
        return filled.reshape(B, Z, Q, *leaf.shape[2:])

    # Time in Z chunks of Q tokens, [B, T, ...] -> [B, Z, Q, ...]. Tokens that fill the last chunk have a step of 0 and
    # start no document: they leave the memory as it is.
    starts_BZQ = split(~keep_BT).astype(jnp.int32)
    input_BZQJRP = split(step_BTH[..., None] * x_BTHP).reshape(B, Z, Q, J, H // J, P)
    b_BZQJN, c_BZQJN = split(b_BTJN), split(c_BTJN)
    log_BZQH = jnp.cumsum(split(step_BTH * A_H), 2)  # log of the decay since the chunk's start
    document_BZQ = jnp.cumsum(starts_BZQ, 2)

    # 1. Within a chunk: y_q = sum over s <= q of (c_q . b_s) decay(s -> q) input_s, as attention of Q tokens.
    within = _within(log_BZQH, document_BZQ).reshape(B, Z, J, H // J, Q, Q)
    scores_BZJQS = jnp.einsum("bzqjn,bzsjn->bzjqs", c_BZQJN, b_BZQJN)
    y = jnp.einsum("bzjrqs,bzsjrp->bzqjrp", scores_BZJQS[:, :, :, None] * within, input_BZQJRP)

    # 2. What each chunk adds to the memory by its end: of its last document alone, decayed from token q to the end.
    last = document_BZQ[:, :, -1:]
    to_end = jnp.exp(log_BZQH[:, :, -1:] - log_BZQH) * (document_BZQ == last)[..., None]
    added = jnp.einsum("bzqjrp,bzqjn->bzjrpn", input_BZQJRP * to_end.reshape(B, Z, Q, J, -1, 1), b_BZQJN)
    # 3. What is left at the chunk's end of the memory before it: nothing if a document starts in the chunk.
    remaining_BZH = jnp.exp(log_BZQH[:, :, -1]) * (last == 0)

    # 4. The memory before each chunk, one after the other.
    memory_BHPN, before_ZBHPN = _carry(memory_BHPN, remaining_BZH, added.reshape(B, Z, H, P, N))
    # 5. What tokens of the chunk's first document read of it, decayed from the chunk's start.
    before = jnp.moveaxis(before_ZBHPN, 0, 1).reshape(B, Z, J, H // J, P, N)
    from_start = jnp.exp(log_BZQH) * (document_BZQ == 0)[..., None]
    y += jnp.einsum("bzqjn,bzjrpn->bzqjrp", c_BZQJN, before) * from_start.reshape(B, Z, Q, J, -1, 1)
    return y.reshape(B, Z * Q, H, P)[:, :T], memory_BHPN


def _carry(memory_BHPN, remaining_BZH, added_BZHPN):
    """Computes `(memory after the last chunk, memory before each chunk)`."""

    def carry_on(memory, chunk):
        remaining_BH, added_BHPN = chunk
        return remaining_BH[..., None, None] * memory + added_BHPN, memory

    chunks = jnp.moveaxis(remaining_BZH, 1, 0), jnp.moveaxis(added_BZHPN, 1, 0)
    return jax.lax.scan(carry_on, memory_BHPN, chunks)


def _within(log_BZQH, document_BZQ):
    """Computes the decay from token s to token q of a chunk, `[B, Z, H, Q, Q]`; 0 for later tokens and documents."""
    Q = log_BZQH.shape[2]
    log_BZHQ = jnp.moveaxis(log_BZQH, 3, 2)
    same_BZ1QS = (document_BZQ[:, :, :, None] == document_BZQ[:, :, None, :])[:, :, None]
    seen = same_BZ1QS & jnp.tril(jnp.ones((Q, Q), bool))
    # Masked before the exponential: what comes later would grow beyond float32, and its gradient with it.
    return jnp.exp(jnp.where(seen, log_BZHQ[..., :, None] - log_BZHQ[..., None, :], -jnp.inf))


def _chunks(T, chunk):
    Q = min(chunk, T)
    return Q, -(-T // Q)


def chunked_flops(length: int, H: int, P: int, N: int, J: int, chunk: int) -> int:
    """Counts FLOPs of the products in `chunked` for one row."""
    Q, Z = _chunks(length, chunk)
    return Z * Q * (2 * Q * N * J + 2 * Q * H * P + 4 * H * P * N)
