"""The text of a compiled program as tests look at it: which arrays it makes, and whether in a loop."""

from typing import NamedTuple

from efficientllm.plan import hlo


class Instruction(NamedTuple):
    """`shapes` are those of the arrays it makes; `in_loop` says whether it stands in the body of a while loop."""

    op: str
    shapes: tuple
    in_loop: bool
    text: str


def instructions(text):
    """Every instruction of a module that makes an array."""
    program = hlo.Program(text)
    return [
        Instruction(each.op, _shapes(each), name in program.in_loops, each.text)
        for name, computation in program.computations.items()
        for each in computation.values()
    ]


def _shapes(instruction):
    return tuple(array.shape for array in instruction.arrays if array.shape and array.dtype != "pred")
