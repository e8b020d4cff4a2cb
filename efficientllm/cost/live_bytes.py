"""Bytes of a program's intermediate arrays that exist at once, from its jaxpr: nothing is made or compiled.

A compiler that fuses elementwise operations never writes some of these arrays: an estimate from above.
"""

import math
import typing

from jax.extend.core import Var

from efficientllm.cost.jaxpr_flops import subjaxprs


def count_live_bytes(closed_jaxpr: typing.Any) -> int:
    """Peak of the bytes of the arrays that equations of a traced program make. Inputs and constants do not count.

    An array exists from the equation that makes it to the last that reads it. A loop has one iteration at a time.
    """
    return _peak(closed_jaxpr.jaxpr)


def _peak(jaxpr):
    last = {}
    for index, equation in enumerate(jaxpr.eqns):
        last |= dict.fromkeys(map(id, _arrays(equation.invars)), index)
    last |= dict.fromkeys(map(id, _arrays(jaxpr.outvars)), len(jaxpr.eqns))
    live, peak, made = 0, 0, {}
    for index, equation in enumerate(jaxpr.eqns):
        outputs = {id(variable): _bytes(variable) for variable in _arrays(equation.outvars)}
        made |= outputs
        live += sum(outputs.values())
        peak = max(peak, live + max(map(_inside, subjaxprs(equation.params)), default=0))
        ended = [variable for variable in made if last.get(variable, index) <= index]
        live -= sum(made.pop(variable) for variable in ended)
    return peak


def _inside(jaxpr):
    """The bytes inside a loop or a call beside what it returns, which are outputs of its equation."""
    return max(0, _peak(jaxpr) - sum(map(_bytes, _arrays(jaxpr.outvars))))


def _arrays(atoms):
    return [atom for atom in atoms if isinstance(atom, Var)]


def _bytes(variable):
    shape, dtype = variable.aval.shape, variable.aval.dtype
    return math.prod(shape) * dtype.itemsize
