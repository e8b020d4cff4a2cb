"""Dropless expert parallelism: rows travel to the devices of their experts in rounds of equal size.

An all-to-all has one static size, and no assignment is dropped. So every round exchanges a fixed number of rows per
pair of devices; the number of rounds follows from the largest count of a pair, and is one if the router is balanced.

Letters as in `dispatch`: k experts of a token, r rows of the experts' input. Others: n devices of the mesh
axis `expert`, L experts of a device, c places of a device in a round.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.ffns import dispatch

# experts(linears, x_rD, weights_r1, sizes_L) -> y_rD, the products of one device's experts
Compute = typing.Callable


class Route(typing.NamedTuple):
    """The device and the order of the rows that one device sends.

    Args:
      expert_r: the expert of each row among those of its device.
      device_r: the device of each row's expert.
      place_r: the row's number among those for its device.
      starts_n, counts_n: the first row for each device, and their number.
    """

    expert_r: jax.Array
    device_r: jax.Array
    place_r: jax.Array
    starts_n: jax.Array
    counts_n: jax.Array


def route(sizes_E: jax.Array, devices: int, rows: int) -> Route:
    """Routes rows that are sorted by expert, `sizes_E` of each."""
    L = len(sizes_E) // devices
    expert_r = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=rows)
    counts_n = jnp.sum(sizes_E.reshape(devices, L), 1)
    starts_n = jnp.cumsum(counts_n) - counts_n
    device_r = expert_r // L
    return Route(expert_r % L, device_r, jnp.arange(rows) - starts_n[device_r], starts_n, counts_n)


def count_rounds(routing: Route, places: int, axes: tuple[str, ...]) -> jax.Array:
    """Counts the rounds that the largest count of a pair of devices needs, over the mesh `axes`."""
    return jax.lax.pmax(-(-jnp.max(routing.counts_n) // places), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def compute_in_rounds(experts: Compute, places: int, operands: tuple, routing: Route, rounds: jax.Array) -> jax.Array:
    """Sends rows to their experts, computes, and returns them, `[r, D]` in the order of the rows.

    `operands` are `(x_rD, weights_r1, linears)`. The backward pass sends the rows again instead of saving what was
    received, because no array can hold what a number of rounds that the data decides would save.
    """
    x_rD = operands[0]

    def add_round(number, y_rD):
        return y_rD + _compute_round(experts, places, operands, routing, number)

    return jax.lax.fori_loop(0, rounds, add_round, jnp.zeros_like(x_rD))


def _forward(experts, places, operands, routing, rounds):
    return compute_in_rounds(experts, places, operands, routing, rounds), (operands, routing, rounds)


def _backward(experts, places, residuals, dy_rD):
    operands, routing, rounds = residuals
    leaves, structure = jax.tree.flatten(operands)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]  # packed weights are no floats

    def compute(floats, number):
        rest = iter(floats)
        whole = [next(rest) if is_float_leaf else leaf for is_float_leaf, leaf in zip(is_float, leaves, strict=True)]
        return _compute_round(experts, places, jax.tree.unflatten(structure, whole), routing, number)

    def add_round(number, sums):
        _, pullback = jax.vjp(lambda floats: compute(floats, number), floats)
        return [total + new.astype(total.dtype) for total, new in zip(sums, pullback(dy_rD)[0], strict=True)]

    floats = [leaf for is_float_leaf, leaf in zip(is_float, leaves, strict=True) if is_float_leaf]
    sums = [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in floats]
    sums = iter(jax.lax.fori_loop(0, rounds, add_round, sums))
    gradients = [
        next(sums).astype(leaf.dtype) if is_float_leaf else np.zeros(leaf.shape, jax.dtypes.float0)
        for is_float_leaf, leaf in zip(is_float, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, gradients), None, None


compute_in_rounds.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compute_round(experts, places, operands, routing, number):
    x_rD, weights_r1, linears = operands
    n, L = len(routing.counts_n), linears["up"].kernel.shape[0]
    # The rows of this round, n devices times c places; places beyond a device's rows hold an arbitrary one.
    place_nc = number * places + jnp.arange(places)[None]
    filled_nc = place_nc < routing.counts_n[:, None]
    row_nc = jnp.where(filled_nc, routing.starts_n[:, None] + place_nc, 0)
    sent_r1 = ((routing.place_r // places) == number)[:, None]
    slot_r1 = jnp.where(sent_r1, (routing.device_r * places + routing.place_r % places)[:, None], 0)
    out = dispatch.Plan(row_nc.reshape(-1), filled_nc.reshape(-1), slot_r1, sent_r1, None)
    expert_nc = jnp.where(filled_nc, routing.expert_r[row_nc], L)

    x_cD = _exchange(dispatch.to_experts(x_rD, out), n)
    weights_c1 = _exchange(dispatch.weights_of_rows(weights_r1, out).astype(x_rD.dtype), n)
    # Rows arrive from each device sorted by expert; empty ones are put behind all others.
    order_c, rank_c, sizes = dispatch.sort(_exchange(expert_nc.reshape(-1, 1), n)[:, 0], L + 1)
    inwards = dispatch.Plan(order_c, None, rank_c[:, None], None, None)
    sizes_L = sizes[:L].at[-1].add(sizes[L])  # with the last expert: their weight is 0
    y_cD = experts(linears, dispatch.to_experts(x_cD, inwards), dispatch.weights_of_rows(weights_c1, inwards), sizes_L)
    return dispatch.from_experts(_exchange(dispatch.from_experts(y_cD, inwards), n), out)


def _exchange(x_cD, n):
    """Exchanges the n equal parts of an array's rows between the devices of the mesh axis `expert`."""
    x_ncD = x_cD.reshape(n, -1, x_cD.shape[-1])
    return jax.lax.all_to_all(x_ncD, "expert", 0, 0, tiled=True).reshape(x_cD.shape)
