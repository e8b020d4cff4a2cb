"""Token dispatch to experts and back: the plan of rows of the experts' input, and the gathers that apply it.

Letters: n tokens, k experts of a token, A = n k assignments, r rows of the experts' input, C capacity.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import UserError


@flax.struct.dataclass
class Plan:
    """Dispatch plan: the row of each assignment in the experts' input, whose rows are sorted by expert.

    Attributes:
      assignment_r: the assignment (token * k + choice) in each row.
      filled_r: False for empty rows; None where all are filled.
      row_nk: the row of each assignment.
      kept_nk: False for dropped assignments; None where none is dropped.
      sizes_E: rows of each expert; None where all experts have r / E.
    """

    assignment_r: jax.Array
    filled_r: jax.Array
    row_nk: jax.Array
    kept_nk: jax.Array
    sizes_E: jax.Array


def dropless(experts_BTk: jax.Array, num_experts: int, real_BT: jax.Array | None = None) -> Plan:
    """Plans a row for every assignment, so that the output of a token depends on no other token.

    Padding tokens (`real_BT` is False) are assigned to experts round-robin, so their content moves no other row.
    """
    B, T, k = experts_BTk.shape
    if real_BT is not None:
        in_turn_BTk = jnp.arange(B * T * k, dtype=jnp.int32).reshape(B, T, k) % num_experts
        experts_BTk = jnp.where(real_BT[..., None], experts_BTk, in_turn_BTk)
    order_A, rank_A, sizes_E = sort(experts_BTk.reshape(-1), num_experts)
    return Plan(order_A, None, rank_A.reshape(B * T, k), None, sizes_E)


def capacity(experts_BTk: jax.Array, num_experts: int, factor: float, real_BT: jax.Array | None = None) -> Plan:
    """Plans `rows_per_expert` rows of each expert for each row of the batch, and drops further assignments.

    Padding tokens (`real_BT` is False; None: no token is padding) take no place and do not count in a row's length.

    First choices come before second ones, and earlier tokens before later ones (GShard: Lepikhin et al. 2020,
    arXiv:2006.16668, Algorithm 1). So a later token's first choice can drop an earlier token's second one: where
    assignments are dropped and k > 1, the layer is not causal. Rows of the batch never compete, so results do not
    depend on the number of devices that the batch is sharded over.
    """
    B, T, k = experts_BTk.shape
    C = rows_per_expert(T, num_experts, k, factor)
    choice_first_BA = jnp.swapaxes(experts_BTk, 1, 2).reshape(B, k * T)
    # `groups` are the sorted groups of a row: its experts, and with padding one group more.
    groups, most_B1 = num_experts, jnp.full((B, 1), C)
    if real_BT is not None:  # padding is sorted after the last expert
        groups, choice_first_BA = groups + 1, jnp.where(jnp.tile(real_BT, (1, k)), choice_first_BA, num_experts)
        most_B1 = jnp.array(_rows_by_length(T, num_experts, k, factor))[jnp.sum(real_BT, 1, keepdims=True)]
    order_BA, rank_BA, sizes_BE = jax.vmap(sort, (0, None))(choice_first_BA, groups)
    # An assignment's place at its expert is its rank in the row less the rank of that expert's first assignment.
    starts_BE = jnp.cumsum(sizes_BE, 1) - sizes_BE
    place_BA = rank_BA - jnp.take_along_axis(starts_BE, choice_first_BA, 1)
    row_BA = (choice_first_BA * B + jnp.arange(B)[:, None]) * C + place_BA
    kept_BA = (place_BA < most_B1) & (choice_first_BA < num_experts)
    kept_nk, row_nk = (
        jnp.swapaxes(array_BA.reshape(B, k, T), 1, 2).reshape(B * T, k) for array_BA in (kept_BA, row_BA)
    )
    # The inverse: the assignment in row r = (e * B + b) * C + place, if the row is filled.
    e, b, place = jnp.unravel_index(jnp.arange(num_experts * B * C), (num_experts, B, C))
    filled_r = place < jnp.minimum(sizes_BE[b, e], most_B1[b, 0])
    choice, t = jnp.divmod(order_BA[b, jnp.where(filled_r, starts_BE[b, e] + place, 0)], T)
    return Plan((b * T + t) * k + choice, filled_r, jnp.where(kept_nk, row_nk, 0), kept_nk, None)


def rows_per_expert(length: int, num_experts: int, top_k: int, factor: float) -> int:
    """Computes the capacity C = ceil(T k / E * factor) of a row of T tokens, at least 1 and at most T."""
    return min(length, max(1, math.ceil(round(length * top_k / num_experts * factor, 6))))


def _rows_by_length(length, num_experts, top_k, factor):
    """Computes `rows_per_expert` of rows of 0 to `length` tokens; the index is the length."""
    lengths = np.arange(length + 1)
    rows = np.maximum(1, np.ceil(np.round(lengths * top_k / num_experts * factor, 6)))
    return np.minimum(np.minimum(lengths, rows), rows_per_expert(length, num_experts, top_k, factor)).astype(np.int32)


def sort(expert_A: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts by expert, stably: `(assignment at each place, place of each assignment, assignments of each expert)`."""
    A = expert_A.shape[0]
    if A * num_experts >= 2**31:
        raise UserError(
            f"moe: {A} assignments to {num_experts} experts on one device are too many to number in 32 bits; "
            "give each device fewer tokens, by a smaller batch_size or a larger accumulate"
        )
    # Distinct keys of one array sort faster than a pair with a stable comparison.
    order_A = jnp.sort(expert_A * A + jnp.arange(A, dtype=jnp.int32)) % A
    places_A = jnp.arange(A, dtype=jnp.int32)
    rank_A = jnp.zeros(A, jnp.int32).at[order_A].set(places_A, unique_indices=True, mode="promise_in_bounds")
    return order_A, rank_A, jnp.sum(expert_A[:, None] == jnp.arange(num_experts), 0, dtype=jnp.int32)


def to_experts(x_nD: jax.Array, plan: Plan) -> jax.Array:
    """Gathers the token of every row, `[r, D]`."""
    return _spread(x_nD, plan.assignment_r // plan.row_nk.shape[1], plan.row_nk, plan.kept_nk)


def from_experts(y_rD: jax.Array, plan: Plan) -> jax.Array:
    """Sums the rows of each token, `[n, D]`; dropped assignments add nothing."""
    return _collect(y_rD, plan.assignment_r // plan.row_nk.shape[1], plan.row_nk, plan.kept_nk)


def weights_of_rows(weights_nk: jax.Array, plan: Plan) -> jax.Array:
    """Gathers the router's weight of every row, `[r, 1]`; zero for empty rows."""
    kept_n1 = None if plan.kept_nk is None else plan.kept_nk.reshape(-1, 1)
    weight_r1 = _spread(weights_nk.reshape(-1, 1), plan.assignment_r, plan.row_nk.reshape(-1, 1), kept_n1)
    return weight_r1 if plan.filled_r is None else jnp.where(plan.filled_r[:, None], weight_r1, 0)


# Each is the other's transpose: both directions gather, where autodiff would scatter. Empty rows hold an arbitrary
# token; only their weight, which is zero forward and backward, cancels them.
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
