"""Grouped matrix product: rows sorted by group times one matrix for each group, as in a mixture of experts.

Letters of this file: A rows (assignments of tokens to experts), E groups, i inputs and o outputs of a matrix.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax

from efficientllm.registry import lookup, register
from efficientllm.runtime import kernel_choice
from efficientllm.weights import Precision, Weight, dense


class Kernel(typing.NamedTuple):
    """The two products of a grouped kernel, accumulated in float32.

    Args:
      rows: `(x_Ai, w_Eio, sizes_E, transposed, out_dtype) -> y_Ao`, row a times its group's matrix (or its transpose),
        which is rounded to x's dtype.
      weights: `(x_Ai, g_Ao, sizes_E, E) -> dw_Eio` in float32, the sum over a group's rows of their outer products.
    """

    rows: typing.Callable
    weights: typing.Callable


def grouped_matmul(
    x_Ai: jax.Array,
    w_Eio: jax.Array | Weight,
    sizes_E: jax.Array | None,
    precision: Precision | str,
    kernel: str = "auto",
) -> jax.Array:
    """Multiplies the first `sizes[0]` rows of x with `w[0]`, the next `sizes[1]` with `w[1]`, ... -> `[A, o]`.

    The sizes sum to A; None stands for A / E rows each, which is a batched product. The result has x's dtype, and both
    passes follow `precision`, a policy or its spec. `kernel` is `auto` or a registered `grouped_kernel`. Raises
    UserError for a kernel or a precision that does not exist.
    """
    precision = Precision.of(precision)
    if isinstance(w_Eio, Weight) and not w_Eio.by_group:

        def product(x, w):
            return grouped_matmul(x, w, sizes_E, precision, kernel)

        return w_Eio.apply(x_Ai, product, lambda v_Eo: _of_rows(v_Eo, sizes_E, x_Ai.shape[0]))
    name = kernel if kernel != "auto" else choose(w_Eio)
    products = lookup("grouped_kernel", name, where="kernel")
    if sizes_E is None:
        name, products = "batched", Kernel(_batched_rows, _batched_weights)
    kernel_choice.record_kernel("grouped_matmul", name)
    return _grouped(x_Ai, w_Eio, sizes_E, precision.product, products)


def _of_rows(v_Eo, sizes_E, rows):
    """Gathers for each row the vector of its group, `[A, o]`."""
    groups = v_Eo.shape[0]
    sizes_E = rows // groups if sizes_E is None else sizes_E
    group_A = jnp.repeat(jnp.arange(groups), sizes_E, total_repeat_length=rows)
    return v_Eo.at[group_A].get(indices_are_sorted=True, mode="promise_in_bounds")


def choose(w_Eio: jax.Array | Weight) -> str:
    """Chooses the grouped kernel for the platform being compiled for.

    XLA turns a ragged product into E dense ones over all rows where it has no kernel for it: on CPUs (measured in
    experiments/moe_cost) and, as released, on GPUs (not measured). TPUs have one, but it would dequantize
    all matrices at once; forms with a tiled product are multiplied one by one by `blocked`.
    """
    is_tiled = isinstance(w_Eio, Weight) and w_Eio.has_tiled_product()
    return "ragged_dot" if kernel_choice.platform() == "tpu" and not is_tiled else "blocked"


def vectors_of_rows(v_Eo: jax.Array, sizes_E: jax.Array | None, rows: int) -> jax.Array:
    """Spreads a vector of each group to its rows, `[E, o] -> [A, o]`: the biases of a grouped product.

    The gradient is a product with the rows' groups as one-hot vectors: a scatter would add E rows one at a time.
    """
    if sizes_E is None:
        return jnp.repeat(v_Eo, rows // v_Eo.shape[0], axis=0)
    return _spread(v_Eo, sizes_E, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spread(v_Eo, sizes_E, rows):
    return _of_rows(jnp.asarray(v_Eo), sizes_E, rows)


def _spread_backward(rows, sizes_E, dy_Ao):
    is_group_AE = _of_rows(jnp.eye(sizes_E.shape[0], dtype=dy_Ao.dtype), sizes_E, rows)
    return _contract(is_group_AE, dy_Ao, (0, 0)).astype(dy_Ao.dtype), None


_spread.defvjp(lambda v, sizes, rows: (_spread(v, sizes, rows), sizes), _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x, w, sizes, product, kernel):
    """Multiplies operands rounded to `product`, in the forward and the backward pass."""
    return kernel.rows(x.astype(product), w, sizes, False, x.dtype)


def _forward(x, w, sizes, product, kernel):
    return _grouped(x, w, sizes, product, kernel), (x.astype(product), w, sizes, jnp.zeros(0, x.dtype))


def _backward(product, kernel, residuals, dy):
    x, w, sizes, like_x = residuals
    dy = dy.astype(product)
    dx = kernel.rows(dy, w, sizes, True, like_x.dtype)
    dw = None if isinstance(w, Weight) else kernel.weights(x, dy, sizes, w.shape[0]).astype(w.dtype)
    return dx, dw, None


_grouped.defvjp(_forward, _backward)


def _block_sizes(rows, groups):
    """Returns rows a product: half of a mean group, and for a large block also a quarter of it for a group's end.

    Big blocks are fast, small ones waste little (measured on CPUs, see experiments/moe_cost).
    """
    block = min(128, 1 << max(1, rows // groups // 2).bit_length() - 1)
    return (block, block // 4) if block >= 32 else (min(block, rows),)


def _for_groups(sizes_E, body, carry):
    """`carry = body(group, start, stop, carry)` for each group that has rows, `start:stop` being its rows."""
    (groups,) = jnp.nonzero(sizes_E, size=sizes_E.shape[0], fill_value=0)
    stops_E = jnp.cumsum(sizes_E)

    def step(i, carry):
        group = groups[i]
        return body(group, stops_E[group] - sizes_E[group], stops_E[group], carry)

    return lax.fori_loop(0, jnp.count_nonzero(sizes_E), step, carry)


def _for_blocks(start, stop, blocks, rows, body, carry):
    """`carry = body(at, mine, carry)` for blocks of rows from `at` on that cover `start:stop`.

    A block of fixed size may reach past `stop`, and past the last row it is moved back: `mine` is True for those of its
    rows that are the group's and were in no block before.
    """
    state = (start, carry)
    for block, smaller in zip(blocks, (*blocks[1:], 0), strict=True):
        # What one smaller block can do is left to it.
        left = block - smaller if smaller else 0

        def step(state, block=block):
            row, carry = state
            at = jnp.minimum(row, rows - block)
            index = at + jnp.arange(block)
            return row + block, body(at, (index >= row) & (index < stop), carry)

        state = lax.while_loop(lambda state, left=left: stop - state[0] > left, step, state)
    return state[1]


def _take(x, at, block):
    return lax.dynamic_slice_in_dim(x, at, block, 0)


def _contract(x, y, axes):
    # Always to float32: a CPU has no product of bfloat16 to bfloat16, and would keep a float32 copy of every matrix.
    return lax.dot_general(x, y, ((axes[:1], axes[1:]), ((), ())), preferred_element_type=jnp.float32)


def _blocked_rows(x_Ai, w_Eio, sizes_E, transposed, out_dtype):
    rows, blocks = x_Ai.shape[0], _block_sizes(x_Ai.shape[0], w_Eio.shape[0])
    operands = Precision(x_Ai.dtype, x_Ai.dtype)

    def group(e, start, stop, y_Ao):
        # Without the barrier XLA converts all groups ahead of the loop, and a decoded token would pay for every expert.
        w, e = lax.optimization_barrier((w_Eio, e))
        w = jax.tree.map(lambda array: array[e], w)
        is_product = isinstance(w, Weight) and not transposed  # one of the form's own
        if is_product and w.has_vector_product(rows):
            mine = (jnp.arange(rows) >= start) & (jnp.arange(rows) < stop)
            return jnp.where(mine[:, None], w.matmul(x_Ai, operands, out_dtype), y_Ao)
        if is_product and w.has_tiled_product():

            def times(x):
                return w.matmul(x, operands, out_dtype)
        else:
            w_io = dense(w).astype(x_Ai.dtype)

            def times(x):
                return _contract(x, w_io, (1, 1 if transposed else 0)).astype(out_dtype)

        def block(at, mine, y_Ao):
            new = times(_take(x_Ai, at, mine.size))
            new = jnp.where(mine[:, None], new, _take(y_Ao, at, mine.size))
            return lax.dynamic_update_slice_in_dim(y_Ao, new, at, 0)

        return _for_blocks(start, stop, blocks, rows, block, y_Ao)

    width = w_Eio.shape[1 if transposed else 2]
    return _for_groups(sizes_E, group, jnp.zeros((rows, width), out_dtype))


def _blocked_weights(x_Ai, g_Ao, sizes_E, groups):
    rows, blocks = x_Ai.shape[0], _block_sizes(x_Ai.shape[0], groups)
    shape_io = x_Ai.shape[1], g_Ao.shape[1]

    def group(e, start, stop, dw_Eio):
        def block(at, mine, dw_io):
            g = jnp.where(mine[:, None], _take(g_Ao, at, mine.size), 0)
            return dw_io + _contract(_take(x_Ai, at, mine.size), g, (0, 0))

        return dw_Eio.at[e].set(_for_blocks(start, stop, blocks, rows, block, jnp.zeros(shape_io, jnp.float32)))

    return _for_groups(sizes_E, group, jnp.zeros((groups, *shape_io), jnp.float32))


# One group after the other, in blocks of rows: only rows that are there are multiplied.
register("grouped_kernel", "blocked")(Kernel(_blocked_rows, _blocked_weights))


def _ragged_rows(x_Ai, w_Eio, sizes_E, transposed, out_dtype):
    w_Eio = dense(w_Eio, after=x_Ai)
    w_Eio = (jnp.swapaxes(w_Eio, 1, 2) if transposed else w_Eio).astype(x_Ai.dtype)
    return lax.ragged_dot(x_Ai, w_Eio, sizes_E, preferred_element_type=out_dtype)


def _ragged_weights(x_Ai, g_Ao, sizes_E, groups):
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return lax.ragged_dot_general(x_Ai, g_Ao, sizes_E, numbers, preferred_element_type=jnp.float32)


# The compiler's own: fast where it has a kernel for it.
register("grouped_kernel", "ragged_dot")(Kernel(_ragged_rows, _ragged_weights))


def _batched_rows(x_Ai, w_Eio, sizes_E, transposed, out_dtype):
    axes = ((2,), (2 if transposed else 1,)), ((0,), (0,))
    y = lax.dot_general(
        _by_group(x_Ai, w_Eio.shape[0]),
        dense(w_Eio, after=x_Ai).astype(x_Ai.dtype),
        axes,
        preferred_element_type=out_dtype,
    )
    return y.reshape(x_Ai.shape[0], -1)


def _batched_weights(x_Ai, g_Ao, sizes_E, groups):
    x, g = (_by_group(array, groups) for array in (x_Ai, g_Ao))
    return lax.dot_general(x, g, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _by_group(x, groups):
    return x.reshape(groups, -1, x.shape[-1])
