"""Arrays that a compiled program or a jaxpr makes, and whether in a loop."""

from typing import NamedTuple

import jax.extend.core

from efficientllm.plan import hlo_text


class Instruction(NamedTuple):
    """An HLO instruction. `shapes` are those of its results; `in_loop`: whether it is in the body of a while loop."""

    op: str
    shapes: tuple
    in_loop: bool
    text: str


def instructions(text):
    """Every instruction of a module that makes an array."""
    program = hlo_text.Program(text)
    return [
        Instruction(instruction.op, _shapes(instruction), name in program.in_loops, instruction.text)
        for name, computation in program.computations.items()
        for instruction in computation.values()
    ]


def _shapes(instruction):
    return tuple(array.shape for array in instruction.arrays if array.shape and array.dtype != "pred")


def array_shapes(jaxpr):
    """Yields the shape of every array that a jaxpr makes, in the jaxprs that it calls too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_shapes(inner)
