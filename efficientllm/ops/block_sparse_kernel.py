"""Block-sparse attention kernel: sorts pairs of query and block by block, and multiplies them in tiles.

It groups queries by block as a mixture groups tokens by expert. Time and memory of both passes grow with the number of
blocks read.

Letters of this file: b rows (one for each chooser of each row of the batch), r query heads of a row, n blocks of a
query, Q queries of a chunk, A = Q n pairs of query and block, P queries of a tile, W tiles of a step, M = P r rows of a
tile, L keys of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficientllm.runtime import kernel_choice

CHUNK_BYTES = 1 << 27  # of the outputs of a chunk's pairs
TILE_ROWS = 2048  # heads of the queries of a tile: XLA gives no smaller product of a loop to more than one core
LOWEST = -1e30  # the score of a masked pair; the difference of two infinite scores would be NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_bTrK: jax.Array, k_bSK: jax.Array, v_bSV: jax.Array, start_bTn: jax.Array, last_bT: jax.Array, size: int
) -> jax.Array:
    """Computes attention over blocks of `size` keys that start at `start_bTn` -> `[b, T, r, V]` in q's dtype.

    A negative start is no block. A query reads keys up to `last_bT`. Scores and softmax are float32. A query without a
    block gets zeros.
    """
    return _forward(q_bTrK, k_bSK, v_bSV, start_bTn, last_bT, size)[0]


def _forward(q_bTrK, k_bSK, v_bSV, start_bTn, last_bT, size):
    T = q_bTrK.shape[1]

    def row(arrays):
        q_TrK, k_SK, v_SV, start_Tn, last_T = arrays
        k_SK, v_SV = _pad(k_SK, size), _pad(v_SV, size)
        chunks = _chunked(q_TrK, start_Tn, last_T, length=_chunk(q_TrK, k_SK, v_SV, start_Tn))
        y, lse = lax.map(lambda chunk: _chunk_forward(*chunk, k_SK, v_SV, size), chunks)
        return _whole(y, T), _whole(lse, T)

    y_bTrV, lse_bTr = lax.map(row, (q_bTrK, k_bSK, v_bSV, start_bTn, last_bT))
    return y_bTrV, (q_bTrK, k_bSK, v_bSV, start_bTn, last_bT, y_bTrV, lse_bTr)


def _backward(size, residuals, dy_bTrV):
    *arrays, y_bTrV, lse_bTr = residuals
    T, S = arrays[0].shape[1], arrays[1].shape[1]
    delta_bTr = jnp.sum(dy_bTrV.astype(jnp.float32) * y_bTrV.astype(jnp.float32), -1)

    def row(arrays):
        q_TrK, k_SK, v_SV, start_Tn, last_T, dy_TrV, lse_Tr, delta_Tr = arrays
        k_SK, v_SV = _pad(k_SK, size), _pad(v_SV, size)
        per_query = (q_TrK, start_Tn, last_T, dy_TrV, lse_Tr, delta_Tr)
        chunks = _chunked(*per_query, length=_chunk(q_TrK, k_SK, v_SV, start_Tn))
        zeros = jnp.zeros(k_SK.shape, jnp.float32), jnp.zeros(v_SV.shape, jnp.float32)
        step = functools.partial(_chunk_backward, k_SK=k_SK, v_SV=v_SV, size=size)
        (dk_SK, dv_SV), dq = lax.scan(step, zeros, chunks)
        return _whole(dq, T), dk_SK[:S].astype(k_SK.dtype), dv_SV[:S].astype(v_SV.dtype)

    dq, dk, dv = lax.map(row, (*arrays, dy_bTrV, lse_bTr, delta_bTr))
    return dq, dk, dv, None, None


attend.defvjp(_forward, _backward)


def _pad(x_S, size):
    return jnp.pad(x_S, ((0, size), *((0, 0),) * (x_S.ndim - 1)))


def _chunk(q_TrK, k_SK, v_SV, start_Tn):
    """Returns queries a chunk: at most `CHUNK_BYTES` of outputs, and few enough that `_sort` has keys of 32 bits."""
    T, r, K = q_TrK.shape
    n = start_Tn.shape[1]
    by_memory = CHUNK_BYTES // (4 * n * r * max(K, v_SV.shape[1]))
    by_number = 2**32 // ((k_SK.shape[0] + 1) * n) - 1
    most = max(1, min(by_memory, by_number))
    return -(-T // -(-T // most))


def _chunked(q_TrK, start_Tn, *others, length):
    """Splits arrays into chunks of `length` queries; queries that pad the last chunk read no block."""

    def split(x_T, fill=0):
        missing = -x_T.shape[0] % length
        x_T = jnp.pad(x_T, ((0, missing), *((0, 0),) * (x_T.ndim - 1)), constant_values=fill)
        return x_T.reshape(-1, length, *x_T.shape[1:])

    return split(q_TrK), split(start_Tn, -1), *map(split, others)


def _whole(x_CQ, T):
    return x_CQ.reshape(-1, *x_CQ.shape[2:])[:T]


def _tile(q_QrK, start_Qn, S, size):
    """Returns queries a tile: `TILE_ROWS` rows, and at most twice the mean number of queries that read a block."""
    readers = start_Qn.size * size // S
    return 1 << max(4, min(2 * readers, TILE_ROWS // q_QrK.shape[1]).bit_length() - 1)


def _sort(start_Qn, S, tile):
    """Sorts pairs by block -> (query of each place, block start of each place, place of each pair).

    A place is an index of the sorted pairs. Pairs without a block, and the padding of the last tile, have the start S.
    """
    Q, n = start_Qn.shape
    A = Q * n
    start_A = jnp.where(start_Qn < 0, S, start_Qn).reshape(-1)
    # Distinct keys of one array sort faster than a pair of arrays.
    key_A = jnp.sort(start_A.astype(jnp.uint32) * A + jnp.arange(A, dtype=jnp.uint32))
    start_A, order_A = (key_A // A).astype(jnp.int32), (key_A % A).astype(jnp.int32)
    pairs_A = jnp.arange(A, dtype=jnp.int32)
    place_A = jnp.zeros(A, jnp.int32).at[order_A].set(pairs_A, unique_indices=True, mode="promise_in_bounds")
    end = (0, tile)
    return jnp.pad(order_A // n, end), jnp.pad(start_A, end, constant_values=S), place_A.reshape(Q, n)


def _for_tiles(start_A, S, tile, body, carry):
    """`carry = body(at_W, start_W, mine_WP, carry)` for tiles that cover the places of all pairs, W tiles a step.

    A tile is the P places from `at` on. `mine` is True for those that read the block of its first place. A tile writes
    wrong results to the others; a later tile overwrites them, because tiles run in order of their places.
    """
    tiles = _tiles_a_step()

    def step(state):
        at, carry = state
        tiles_W = []
        for _ in range(tiles):
            starts_P = _take(start_A, at, tile)
            mine_P = (starts_P == starts_P[0]) & (starts_P < S)
            tiles_W.append((at, jnp.minimum(starts_P[0], S), mine_P))
            at = at + jnp.sum(mine_P, dtype=jnp.int32)
        at_W, start_W, mine_WP = zip(*tiles_W, strict=True)
        return at, body(at_W, start_W, jnp.stack(mine_WP), carry)

    pairs = jnp.sum(start_A < S)
    return lax.while_loop(lambda state: state[0] < pairs, step, (jnp.int32(0), carry))[1]


def _tiles_a_step():
    """Returns how many tiles are batched in one product: one fills the cores of a CPU, accelerators need several."""
    return 1 if kernel_choice.platform() == "cpu" else 16


def _take(x, at, length):
    return lax.dynamic_slice_in_dim(x, at, length, 0)


def _put(x, new_W, at_W):
    for at, new in zip(at_W, new_W, strict=True):
        x = lax.dynamic_update_slice_in_dim(x, new, at, 0)
    return x


def _add(x, new_W, at_W):
    for at, new in zip(at_W, new_W, strict=True):
        x = lax.dynamic_update_slice_in_dim(x, _take(x, at, new.shape[0]) + new, at, 0)
    return x


def _stack(x, at_W, length):
    return jnp.stack([_take(x, at, length) for at in at_W])


def _rows(x, index):
    return x.at[index].get(mode="promise_in_bounds")


def _dot(x, y, contracted):
    """Multiplies tile by tile, accumulated in float32; contracts the axes `contracted` of x and of y."""
    x_axis, y_axis = contracted
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _readable(start_W, mine_WP, last_WP, size, r):
    """Computes `[W, P r, L]`: whether a query of a tile may read a key of its block."""
    key_WL = jnp.stack(start_W)[:, None] + jnp.arange(size)
    readable_WPL = mine_WP[..., None] & (key_WL[:, None] <= last_WP[..., None])
    W, P, L = readable_WPL.shape
    return jnp.broadcast_to(readable_WPL[:, :, None], (W, P, r, L)).reshape(W, P * r, L)


def _chunk_forward(q_QrK, start_Qn, last_Q, k_SK, v_SV, size):
    (Q, r, K), V, S = q_QrK.shape, v_SV.shape[1], k_SK.shape[0] - size
    tile = _tile(q_QrK, start_Qn, S, size)
    query_A, start_A, place_Qn = _sort(start_Qn, S, tile)
    q_QrK = q_QrK * K**-0.5

    def read(at_W, start_W, mine_WP, carry):
        y_A, top_A, sum_A = carry
        query_WP = _stack(query_A, at_W, tile)  # the queries whose pairs stand at the tile's places
        q_WMK = _rows(q_QrK.reshape(Q, r * K), query_WP).reshape(len(at_W), tile * r, K)
        k_WLK, v_WLV = _stack(k_SK, start_W, size), _stack(v_SV, start_W, size)
        readable = _readable(start_W, mine_WP, _rows(last_Q, query_WP), size, r)
        # One softmax for each pair of query and block, not yet normalized: `_merge` joins those of a query.
        scores_WML = jnp.where(readable, _dot(q_WMK, k_WLK, (2, 2)), LOWEST)
        top_WM = jnp.max(scores_WML, -1)
        weights_WML = jnp.exp(scores_WML - top_WM[..., None])
        y_WMV = _dot(weights_WML.astype(v_SV.dtype), v_WLV, (2, 1))
        split = len(at_W), tile, r
        return (
            _put(y_A, y_WMV.reshape(len(at_W), tile, r * V), at_W),
            _put(top_A, top_WM.reshape(split), at_W),
            _put(sum_A, jnp.sum(weights_WML, -1).reshape(split), at_W),
        )

    places = start_A.shape[0]
    carry = jnp.zeros((places, r * V)), jnp.full((places, r), LOWEST), jnp.zeros((places, r))
    return _merge(*_for_tiles(start_A, S, tile, read, carry), place_Qn, start_Qn >= 0, q_QrK.dtype)


def _merge(y_A, top_A, sum_A, place_Qn, read_Qn, dtype):
    """Merges the softmaxes of a query's blocks into one -> (output `[Q, r, V]`, log of its sum `[Q, r]`)."""
    # softmax(blocks) = sum over blocks of exp(top_n - top) y_n / sum over blocks of exp(top_n - top) sum_n.
    read_Qn1 = read_Qn[..., None]
    top_Qnr = jnp.where(read_Qn1, _rows(top_A, place_Qn), LOWEST)
    top_Qr = jnp.max(top_Qnr, 1)
    weight_Qnr = jnp.where(read_Qn1, jnp.exp(top_Qnr - top_Qr[:, None]), 0)
    sum_Qr = jnp.sum(weight_Qnr * _rows(sum_A, place_Qn), 1)
    weight_Qnr = weight_Qnr / jnp.where(sum_Qr > 0, sum_Qr, 1)[:, None]
    Q, n, r = weight_Qnr.shape
    y_QrV = 0
    for i in range(n):
        y_QrV += weight_Qnr[:, i, :, None] * _rows(y_A, place_Qn[:, i]).reshape(Q, r, -1)
    return y_QrV.astype(dtype), top_Qr + jnp.log(jnp.where(sum_Qr > 0, sum_Qr, 1))


def _chunk_backward(carry, chunk, k_SK, v_SV, size):
    """Adds a chunk's gradients of k and v to `carry` -> `((dk, dv), dq)`, as FlashAttention's backward pass does.

    Weights are recomputed from the log of the softmax's sum, `lse`; `delta` is `sum(dy * y)` of each query and head.
    """
    q_QrK, start_Qn, last_Q, dy_QrV, lse_Qr, delta_Qr = chunk
    (Q, r, K), S = q_QrK.shape, k_SK.shape[0] - size
    tile, scale = _tile(q_QrK, start_Qn, S, size), K**-0.5
    query_A, start_A, place_Qn = _sort(start_Qn, S, tile)

    def read(at_W, start_W, mine_WP, carry):
        dq_A, dk_SK, dv_SV = carry
        W, query_WP = len(at_W), _stack(query_A, at_W, tile)
        # Gather what belongs to the tile's queries: [Q, r, x] -> [W, P r, x], a row for each query and head.
        q_WMK, dy_WMV, lse_WM1, delta_WM1 = (
            _rows(x.reshape(Q, -1), query_WP).reshape(W, tile * r, -1)
            for x in (q_QrK * scale, dy_QrV, lse_Qr, delta_Qr)
        )
        # The block of keys and values that each tile reads.
        k_WLK, v_WLV = _stack(k_SK, start_W, size), _stack(v_SV, start_W, size)
        readable = _readable(start_W, mine_WP, _rows(last_Q, query_WP), size, r)
        # weights = exp(scores - lse), and the softmax's gradient: dscores = weights * (dy v^T - delta).
        weights_WML = jnp.where(readable, jnp.exp(_dot(q_WMK, k_WLK, (2, 2)) - lse_WM1), 0)
        dweights_WML = _dot(dy_WMV, v_WLV, (2, 2))
        dscores_WML = (weights_WML * (dweights_WML - delta_WM1)).astype(k_SK.dtype)
        # dq = dscores k, one row of e = r K numbers a query.
        dq_WPe = (_dot(dscores_WML, k_WLK, (2, 1)) * scale).reshape(W, tile, r * K)
        # A query's dq comes from several tiles, so it is put at the pair's place; dk and dv are added to the block's.
        return (
            _put(dq_A, dq_WPe, at_W),
            _add(dk_SK, _dot(dscores_WML, q_WMK, (1, 1)), start_W),
            _add(dv_SV, _dot(weights_WML.astype(dy_WMV.dtype), dy_WMV, (1, 1)), start_W),
        )

    dq_A = jnp.zeros((start_A.shape[0], r * K))
    dq_A, dk_SK, dv_SV = _for_tiles(start_A, S, tile, read, (dq_A, *carry))
    # Sum the pairs of each query: one gather for each of its n blocks.
    dq_Qe = 0
    for i in range(start_Qn.shape[1]):
        dq_Qe += jnp.where(start_Qn[:, i, None] >= 0, _rows(dq_A, place_Qn[:, i]), 0)
    return (dk_SK, dv_SV), dq_Qe.reshape(Q, r, K).astype(q_QrK.dtype)
