"""Exact matmul FLOPs of a function from its jaxpr; tests check the formulas against them.

XLA's `cost_analysis` counts the body of a scan once, whatever its length. Here a scan counts its length, a `cond` its
most expensive branch, a `shard_map` every shard; a multiply-add is two FLOPs. Products with zeros count too: causal
masks are not halved, and padding of a convolution counts.
"""

import math
import typing
from collections.abc import Callable

import jax
from jax.interpreters import partial_eval

from efficientllm.ops.attention_mask import flash_flops
from efficientllm.ops.native import flash
from efficientllm.ops.native import matmul as native

# The jaxpr of a custom kernel does not show its products: count the reference form of the same function instead.
OPAQUE = ("pallas_call", "ffi_call", "custom_call", "dot_product_attention", "triton_kernel_call")

ONCE = "_compute_round"  # the jitted body of a loop that runs once if a router is balanced (`ffns.expert_all_to_all`)


def count_matmul_flops(fn: Callable, *args, **kwargs) -> float:
    """FLOPs of every matrix product, ragged product and convolution in one call of `fn`.

    `args` may be arrays or `jax.ShapeDtypeStruct`; nothing is computed. Raises ValueError for products inside a
    `while` loop, whose trip count is not in the jaxpr, and for opaque kernels.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def count_needed_flops(fn: Callable, *args) -> float:
    """`count_matmul_flops` without dead code, which the compiler removes as well."""
    return count_program_flops(jax.make_jaxpr(fn)(*args))


def count_program_flops(closed_jaxpr: typing.Any, turns: int | None = None) -> float:
    """`count_needed_flops` of a traced program (`jax.jit(fn).trace(...).jaxpr`).

    `turns` is the trip count of its outermost `while` loops. Nested `while` loops, and all of them without `turns`,
    raise ValueError if they hold products.
    """
    jaxpr = closed_jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used, turns)


def _count(jaxpr, turns=None):
    return sum(_count_equation(equation, turns) for equation in jaxpr.eqns)


def _count_equation(equation, turns):
    name, params = equation.primitive.name, equation.params
    if name == "ffi_call" and params["target_name"] in _NATIVE:
        return _NATIVE[params["target_name"]](equation)
    if name in _LEAVES:
        return _LEAVES[name](equation)
    if name.startswith(OPAQUE):
        raise ValueError(f"{name} is a kernel whose FLOPs its jaxpr does not show: count its plain form")
    looping = name == "while" and turns is not None
    inner = [_count(jaxpr, None if looping else turns) for jaxpr in subjaxprs(params)]
    if name == "cond":
        return max(inner)
    if looping:
        return sum(inner) * turns
    if name == "while" and any(inner) and _is_once(params):
        return sum(inner)
    if name == "while" and any(inner):
        raise ValueError("a while loop holds matrix products and its trip count is unknown: use scan, or static bounds")
    if name == "scan":
        return sum(inner) * params["length"]
    if name == "shard_map":
        return sum(inner) * _shards(params)
    return sum(inner)


def _is_once(params):
    """Whether a loop runs once if a router is balanced: the loop over the rounds of `ffns.expert_all_to_all`."""
    return any(equation.params.get("name") == ONCE for equation in params["body_jaxpr"].jaxpr.eqns)


def _shards(params):
    """Number of shards of a shard_map, whose body has the shapes of one shard."""
    axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # renamed in jax 0.10
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def subjaxprs(params: dict[str, typing.Any]) -> typing.Iterator[typing.Any]:
    """Yields the jaxprs among an equation's parameters: bodies, branches, primal functions of custom derivatives."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr"):
                yield item.jaxpr


def _dot_general(equation):
    lhs, rhs = (operand.aval.shape for operand in equation.invars)
    (_, contracted), (_, batched) = equation.params["dimension_numbers"]
    return 2 * math.prod(lhs) * _prod_except(rhs, (*contracted, *batched))


def _ragged_dot_general(equation):
    """Each row of the left side multiplies one group of the right side: the number of groups does not matter."""
    lhs, rhs = (operand.aval.shape for operand in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    return 2 * math.prod(lhs) * _prod_except(rhs, (*contracted, *batched, *numbers.rhs_group_dimensions))


def _convolution(equation):
    kernel = equation.invars[1].aval.shape
    output = equation.outvars[0].aval.shape
    output_features = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(output) * _prod_except(kernel, (output_features,))


def _native_matmul(equation):
    """The sizes of a `[m, k] @ b [k, n]`, of which operands may be transposed: `m k` of a, and n of the result."""
    return 2 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[1]


def _native_attention(equation):
    params, (q, _, v, *_) = equation.params, (operand.aval.shape for operand in equation.invars)
    attributes = dict(params["attributes"])
    is_gradient = params["target_name"] == flash.GRADIENTS
    return flash_flops(q, v, bool(attributes["is_causal"]), int(attributes["window"]), is_gradient)


def _prod_except(shape, axes):
    return math.prod(size for axis, size in enumerate(shape) if axis not in axes)


_NATIVE = {
    native.TARGET: _native_matmul,
    flash.TARGET: _native_attention,
    flash.GRADIENTS: _native_attention,
}
_LEAVES = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _convolution,
}
