"""Moving tokens to their experts and back: a plan of rows, and the two gathers that follow it.

Letters of this file: N tokens, k experts a token, A = N k assignments, R rows of the experts' input, C capacity.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import UserError


@flax.struct.dataclass
class Plan:
    """Where each assignment's row lies. Rows are sorted by expert.

    assignment_r: the assignment (token * k + choice) in each row.
    filled_r: False for rows that hold nothing; None where all are filled.
    row_nk: the row of each assignment.
    kept_nk: False for assignments that were dropped; None where none can be.
    sizes_E: rows of each expert; None where all have R / E.
    """

    assignment_r: jax.Array
    filled_r: jax.Array
    row_nk: jax.Array
    kept_nk: jax.Array
    sizes_E: jax.Array


def dropless(experts_BTk: jax.Array, num_experts: int, real_BT: jax.Array | None = None) -> Plan:
    """Every assignment has a row: what a token gets depends on no other token.

    Padding (where `real_BT` is false) is dealt out in turn: what stands in it moves no row of another token.
    """
    B, T, k = experts_BTk.shape
    if real_BT is not None:
        in_turn_BTk = jnp.arange(B * T * k, dtype=jnp.int32).reshape(B, T, k) % num_experts
        experts_BTk = jnp.where(real_BT[..., None], experts_BTk, in_turn_BTk)
    order_A, rank_A, sizes_E = _sort(experts_BTk.reshape(-1), num_experts)
    return Plan(order_A, None, rank_A.reshape(B * T, k), None, sizes_E)


def capacity(experts_BTk: jax.Array, num_experts: int, factor: float, real_BT: jax.Array | None = None) -> Plan:
    """Each expert takes `rows_per_expert` assignments of each row of the batch; the rest are dropped.

    A row is as long as it has tokens that are no padding (`real_BT`, None: all are): padding takes no place.

    First choices come before second ones, and earlier tokens before later ones (GShard: Lepikhin et al. 2020,
    arXiv:2006.16668, Algorithm 1). So a later token's first choice can drop an earlier token's second one: where rows
    are dropped and k > 1, the layer is not causal. Rows of the batch never compete, so results do not depend on how
    many devices share the batch.
    """
    B, T, k = experts_BTk.shape
    C = rows_per_expert(T, num_experts, k, factor)
    choice_first_BA = jnp.swapaxes(experts_BTk, 1, 2).reshape(B, k * T)
    groups, most_B1 = num_experts, jnp.full((B, 1), C)
    if real_BT is not None:  # padding goes behind the last expert
        groups, choice_first_BA = groups + 1, jnp.where(jnp.tile(real_BT, (1, k)), choice_first_BA, num_experts)
        most_B1 = jnp.array(_rows_by_length(T, num_experts, k, factor))[jnp.sum(real_BT, 1, keepdims=True)]
    order_BA, rank_BA, sizes_BE = jax.vmap(_sort, (0, None))(choice_first_BA, groups)
    starts_BE = jnp.cumsum(sizes_BE, 1) - sizes_BE
    place_BA = rank_BA - jnp.take_along_axis(starts_BE, choice_first_BA, 1)
    row_BA = (choice_first_BA * B + jnp.arange(B)[:, None]) * C + place_BA
    kept_BA = (place_BA < most_B1) & (choice_first_BA < num_experts)
    kept_nk, row_nk = (
        jnp.swapaxes(array_BA.reshape(B, k, T), 1, 2).reshape(B * T, k) for array_BA in (kept_BA, row_BA)
    )
    # What row r = (e * B + b) * C + place holds, if it is filled.
    e, b, place = jnp.unravel_index(jnp.arange(num_experts * B * C), (num_experts, B, C))
    filled_r = place < jnp.minimum(sizes_BE[b, e], most_B1[b, 0])
    choice, t = jnp.divmod(order_BA[b, jnp.where(filled_r, starts_BE[b, e] + place, 0)], T)
    return Plan((b * T + t) * k + choice, filled_r, jnp.where(kept_nk, row_nk, 0), kept_nk, None)


def rows_per_expert(length: int, num_experts: int, top_k: int, factor: float) -> int:
    """C = ceil(T k / E * factor) for a row of T tokens, 1 at least; more than T is never filled."""
    return min(length, max(1, math.ceil(round(length * top_k / num_experts * factor, 6))))


def _rows_by_length(length, num_experts, top_k, factor):
    """`rows_per_expert` of rows of 0 to `length` tokens."""
    lengths = np.arange(length + 1)
    rows = np.maximum(1, np.ceil(np.round(lengths * top_k / num_experts * factor, 6)))
    return np.minimum(np.minimum(lengths, rows), rows_per_expert(length, num_experts, top_k, factor)).astype(np.int32)


def _sort(expert_A, num_experts):
    """Stable sort by expert -> (the assignment at each place, the place of each assignment, assignments an expert)."""
    A = expert_A.shape[0]
    if A * num_experts >= 2**31:
        raise UserError(
            f"moe: {A} assignments to {num_experts} experts on one device are too many to number in 32 bits; "
            "give each device fewer tokens (config.train.batch_size, config.train.accumulate)"
        )
    # Distinct keys of one array sort faster than a pair with a stable comparison.
    order_A = jnp.sort(expert_A * A + jnp.arange(A, dtype=jnp.int32)) % A
    places_A = jnp.arange(A, dtype=jnp.int32)
    rank_A = jnp.zeros(A, jnp.int32).at[order_A].set(places_A, unique_indices=True, mode="promise_in_bounds")
    return order_A, rank_A, jnp.sum(expert_A[:, None] == jnp.arange(num_experts), 0, dtype=jnp.int32)


def to_experts(x_nD: jax.Array, plan: Plan) -> jax.Array:
    """The token of every row, `[R, D]`."""
    return _spread(x_nD, plan.assignment_r // plan.row_nk.shape[1], plan.row_nk, plan.kept_nk)


def from_experts(y_rD: jax.Array, plan: Plan) -> jax.Array:
    """The sum over each token's rows, `[N, D]`; dropped assignments add nothing."""
    return _collect(y_rD, plan.assignment_r // plan.row_nk.shape[1], plan.row_nk, plan.kept_nk)


def weights_of_rows(weights_nk: jax.Array, plan: Plan) -> jax.Array:
    """The router's weight of every row, `[R, 1]`; zero for rows that hold nothing."""
    kept = None if plan.kept_nk is None else plan.kept_nk.reshape(-1, 1)
    weight_r1 = _spread(weights_nk.reshape(-1, 1), plan.assignment_r, plan.row_nk.reshape(-1, 1), kept)
    return weight_r1 if plan.filled_r is None else jnp.where(plan.filled_r[:, None], weight_r1, 0)


# Each is the other's transpose: gathers both ways, where autodiff would scatter. Rows that hold nothing are told apart
# by their weight alone, which is zero forward and backward.
@jax.custom_vjp
def _spread(x_nD, token_r, row_nk, kept_nk):
    return _rows(x_nD, token_r)


@jax.custom_vjp
def _collect(y_rD, token_r, row_nk, kept_nk):
    total = 0
    for choice in range(row_nk.shape[1]):
        y_nD = _rows(y_rD, row_nk[:, choice])
        total += y_nD if kept_nk is None else jnp.where(kept_nk[:, choice, None], y_nD, 0)
    return total


_spread.defvjp(lambda x, *plan: (_spread(x, *plan), plan), lambda plan, g: (_collect(g, *plan), None, None, None))
_collect.defvjp(lambda y, *plan: (_collect(y, *plan), plan), lambda plan, g: (_spread(g, *plan), None, None, None))


def _rows(x, index):
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds")
