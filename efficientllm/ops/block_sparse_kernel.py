"""Attention over chosen blocks as a mixture computes its experts: pairs of query and block are sorted by block, and the
queries of a block meet its keys in tiles. Time and memory grow with the blocks read, in both passes.

Letters of this file: N rows (a chooser of a row of the batch), R query heads a row, n blocks a query, Q queries of a
chunk, A = Q n pairs of query and block, P queries of a tile, W tiles a step, L keys of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficientllm.runtime import kernel_choice

CHUNK_BYTES = 1 << 27  # of what the pairs of a chunk put out
TILE_ROWS = 2048  # heads of the queries of a tile: XLA gives no smaller product of a loop to more than one core
LOWEST = -1e30  # a score that no softmax sees; an infinite one would make NaN of a difference


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q_NTRK, k_NSK, v_NSV, start_NTn, index_NT, size):
    """Each query over the blocks of `size` keys that start at `start` (none where negative), up to the key it stands at
    -> `[N, T, R, V]` in q's dtype. Scores and softmax are float32; no block gives zeros."""
    return _forward(q_NTRK, k_NSK, v_NSV, start_NTn, index_NT, size)[0]


def _forward(q_NTRK, k_NSK, v_NSV, start_NTn, index_NT, size):
    T = q_NTRK.shape[1]

    def row(arrays):
        q_TRK, k_SK, v_SV, start_Tn, index_T = arrays
        k_SK, v_SV = _pad(k_SK, size), _pad(v_SV, size)
        chunks = _chunked(q_TRK, start_Tn, index_T, length=_chunk(q_TRK, k_SK, v_SV, start_Tn))
        y, lse = lax.map(lambda chunk: _chunk_forward(*chunk, k_SK, v_SV, size), chunks)
        return _whole(y, T), _whole(lse, T)

    y_NTRV, lse_NTR = lax.map(row, (q_NTRK, k_NSK, v_NSV, start_NTn, index_NT))
    return y_NTRV, (q_NTRK, k_NSK, v_NSV, start_NTn, index_NT, y_NTRV, lse_NTR)


def _backward(size, residuals, dy_NTRV):
    *arrays, y_NTRV, lse_NTR = residuals
    T, S = arrays[0].shape[1], arrays[1].shape[1]
    delta_NTR = jnp.sum(dy_NTRV.astype(jnp.float32) * y_NTRV.astype(jnp.float32), -1)

    def row(arrays):
        q_TRK, k_SK, v_SV, start_Tn, index_T, dy_TRV, lse_TR, delta_TR = arrays
        k_SK, v_SV = _pad(k_SK, size), _pad(v_SV, size)
        per_query = (q_TRK, start_Tn, index_T, dy_TRV, lse_TR, delta_TR)
        chunks = _chunked(*per_query, length=_chunk(q_TRK, k_SK, v_SV, start_Tn))
        zeros = jnp.zeros(k_SK.shape, jnp.float32), jnp.zeros(v_SV.shape, jnp.float32)
        step = functools.partial(_chunk_backward, k_SK=k_SK, v_SV=v_SV, size=size)
        (dk_SK, dv_SV), dq = lax.scan(step, zeros, chunks)
        return _whole(dq, T), dk_SK[:S].astype(k_SK.dtype), dv_SV[:S].astype(v_SV.dtype)

    dq, dk, dv = lax.map(row, (*arrays, dy_NTRV, lse_NTR, delta_NTR))
    return dq, dk, dv, None, None


attend.defvjp(_forward, _backward)


def _pad(x_S, size):
    return jnp.pad(x_S, ((0, size), *((0, 0),) * (x_S.ndim - 1)))


def _chunk(q_TRK, k_SK, v_SV, start_Tn):
    """Queries a chunk: as many as `CHUNK_BYTES` allow, and as leave pairs and keys to be numbered in 32 bits."""
    T, R, K = q_TRK.shape
    n = start_Tn.shape[1]
    by_memory = CHUNK_BYTES // (4 * n * R * max(K, v_SV.shape[1]))
    by_number = 2**32 // ((k_SK.shape[0] + 1) * n) - 1
    most = max(1, min(by_memory, by_number))
    return -(-T // -(-T // most))


def _chunked(q_TRK, start_Tn, *others, length):
    """Each array in chunks of `length` queries; queries that fill the last one read no block."""

    def split(x_T, fill=0):
        missing = -x_T.shape[0] % length
        x_T = jnp.pad(x_T, ((0, missing), *((0, 0),) * (x_T.ndim - 1)), constant_values=fill)
        return x_T.reshape(-1, length, *x_T.shape[1:])

    return split(q_TRK), split(start_Tn, -1), *map(split, others)


def _whole(x_CQ, T):
    return x_CQ.reshape(-1, *x_CQ.shape[2:])[:T]


def _tile(q_QRK, start_Qn, S, size):
    """Queries a tile: `TILE_ROWS` rows, but no more than twice the queries that read a block if all are read alike."""
    readers = start_Qn.size * size // S
    return 1 << max(4, min(2 * readers, TILE_ROWS // q_QRK.shape[1]).bit_length() - 1)


def _sort(start_Qn, S, tile):
    """Pairs by the block they read -> (query of each place, block start of each place, place of each pair).

    A tile's places past the last pair, and the pairs of no block, have the start S.
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

    A tile is the P places from `at` on, of which it has those of the block its first place reads. What it does to the
    others, a later tile makes good: tiles come in order of their places.
    """
    tiles = _tiles_a_step()

    def step(state):
        at, carry = state
        found = []
        for _ in range(tiles):
            starts_P = _take(start_A, at, tile)
            mine_P = (starts_P == starts_P[0]) & (starts_P < S)
            found.append((at, jnp.minimum(starts_P[0], S), mine_P))
            at = at + jnp.sum(mine_P, dtype=jnp.int32)
        at_W, start_W, mine_WP = zip(*found, strict=True)
        return at, body(at_W, start_W, jnp.stack(mine_WP), carry)

    pairs = jnp.sum(start_A < S)
    return lax.while_loop(lambda state: state[0] < pairs, step, (jnp.int32(0), carry))[1]


def _tiles_a_step():
    """One where a product of a tile fills the cores, several where the device is wide."""
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
    """A product for each tile, accumulated in float32."""
    x_axis, y_axis = contracted
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _readable(start_W, mine_WP, index_WP, size, R):
    """`[W, P R, L]`: whether a query of a tile may read a key of its block."""
    key_WL = jnp.stack(start_W)[:, None] + jnp.arange(size)
    readable_WPL = mine_WP[..., None] & (key_WL[:, None] <= index_WP[..., None])
    W, P, L = readable_WPL.shape
    return jnp.broadcast_to(readable_WPL[:, :, None], (W, P, R, L)).reshape(W, P * R, L)


def _chunk_forward(q_QRK, start_Qn, index_Q, k_SK, v_SV, size):
    (Q, R, K), V, S = q_QRK.shape, v_SV.shape[1], k_SK.shape[0] - size
    tile = _tile(q_QRK, start_Qn, S, size)
    query_A, start_A, place_Qn = _sort(start_Qn, S, tile)
    q_QRK = q_QRK * K**-0.5

    def read(at_W, start_W, mine_WP, carry):
        # M = P R: the rows of a tile, one for each of its queries and each query head.
        y_A, top_A, sum_A = carry
        query_WP = _stack(query_A, at_W, tile)  # the queries whose pairs stand at the tile's places
        q_WMK = _rows(q_QRK.reshape(Q, R * K), query_WP).reshape(len(at_W), tile * R, K)
        k_WLK, v_WLV = _stack(k_SK, start_W, size), _stack(v_SV, start_W, size)
        readable = _readable(start_W, mine_WP, _rows(index_Q, query_WP), size, R)
        # One softmax a pair of query and block, not yet normalised: `_merge` joins those of a query.
        scores_WML = jnp.where(readable, _dot(q_WMK, k_WLK, (2, 2)), LOWEST)
        top_WM = jnp.max(scores_WML, -1)
        weights_WML = jnp.exp(scores_WML - top_WM[..., None])
        y_WMV = _dot(weights_WML.astype(v_SV.dtype), v_WLV, (2, 1))
        split = len(at_W), tile, R
        return (
            _put(y_A, y_WMV.reshape(len(at_W), tile, R * V), at_W),
            _put(top_A, top_WM.reshape(split), at_W),
            _put(sum_A, jnp.sum(weights_WML, -1).reshape(split), at_W),
        )

    places = start_A.shape[0]
    carry = jnp.zeros((places, R * V)), jnp.full((places, R), LOWEST), jnp.zeros((places, R))
    return _merge(*_for_tiles(start_A, S, tile, read, carry), place_Qn, start_Qn >= 0, q_QRK.dtype)


def _merge(y_A, top_A, sum_A, place_Qn, read_Qn, dtype):
    """One softmax of the parts that a query's blocks have given -> (output `[Q, R, V]`, log of its sum `[Q, R]`)."""
    read_Qn1 = read_Qn[..., None]
    top_QnR = jnp.where(read_Qn1, _rows(top_A, place_Qn), LOWEST)
    top_QR = jnp.max(top_QnR, 1)
    weight_QnR = jnp.where(read_Qn1, jnp.exp(top_QnR - top_QR[:, None]), 0)
    sum_QR = jnp.sum(weight_QnR * _rows(sum_A, place_Qn), 1)
    weight_QnR = weight_QnR / jnp.where(sum_QR > 0, sum_QR, 1)[:, None]
    Q, n, R = weight_QnR.shape
    y_QRV = 0
    for i in range(n):
        y_QRV += weight_QnR[:, i, :, None] * _rows(y_A, place_Qn[:, i]).reshape(Q, R, -1)
    return y_QRV.astype(dtype), top_QR + jnp.log(jnp.where(sum_QR > 0, sum_QR, 1))


def _chunk_backward(carry, chunk, k_SK, v_SV, size):
    """Adds a chunk's gradients of k and v to `carry` -> `((dk, dv), dq)`, as FlashAttention's backward pass does.

    Weights are recomputed from the log of the softmax's sum, `lse`; `delta` is `sum(dy * y)` of each query and head.
    """
    q_QRK, start_Qn, index_Q, dy_QRV, lse_QR, delta_QR = chunk
    (Q, R, K), S = q_QRK.shape, k_SK.shape[0] - size
    tile, scale = _tile(q_QRK, start_Qn, S, size), K**-0.5
    query_A, start_A, place_Qn = _sort(start_Qn, S, tile)

    def read(at_W, start_W, mine_WP, carry):
        dq_A, dk_SK, dv_SV = carry
        W, query_WP = len(at_W), _stack(query_A, at_W, tile)
        # Gather what belongs to the tile's queries: [Q, R, x] -> [W, P R, x], a row for each query and head.
        q_WMK, dy_WMV, lse_WM1, delta_WM1 = (
            _rows(x.reshape(Q, -1), query_WP).reshape(W, tile * R, -1)
            for x in (q_QRK * scale, dy_QRV, lse_QR, delta_QR)
        )
        # The block of keys and values that each tile reads.
        k_WLK, v_WLV = _stack(k_SK, start_W, size), _stack(v_SV, start_W, size)
        readable = _readable(start_W, mine_WP, _rows(index_Q, query_WP), size, R)
        # weights = exp(scores - lse), and the softmax's gradient: dscores = weights * (dy v^T - delta).
        weights_WML = jnp.where(readable, jnp.exp(_dot(q_WMK, k_WLK, (2, 2)) - lse_WM1), 0)
        dweights_WML = _dot(dy_WMV, v_WLV, (2, 2))
        dscores_WML = (weights_WML * (dweights_WML - delta_WM1)).astype(k_SK.dtype)
        # dq = dscores k, one row of E = R K numbers a query.
        dq_WPE = (_dot(dscores_WML, k_WLK, (2, 1)) * scale).reshape(W, tile, R * K)
        # A query's dq comes from several tiles, so it is put at the pair's place; dk and dv are added to the block's.
        return (
            _put(dq_A, dq_WPE, at_W),
            _add(dk_SK, _dot(dscores_WML, q_WMK, (1, 1)), start_W),
            _add(dv_SV, _dot(weights_WML.astype(dy_WMV.dtype), dy_WMV, (1, 1)), start_W),
        )

    dq_A = jnp.zeros((start_A.shape[0], R * K))
    dq_A, dk_SK, dv_SV = _for_tiles(start_A, S, tile, read, (dq_A, *carry))
    # Sum the pairs of each query: one gather for each of its n blocks.
    dq_QE = 0
    for i in range(start_Qn.shape[1]):
        dq_QE += jnp.where(start_Qn[:, i, None] >= 0, _rows(dq_A, place_Qn[:, i]), 0)
    return (dk_SK, dv_SV), dq_QE.reshape(Q, R, K).astype(q_QRK.dtype)
