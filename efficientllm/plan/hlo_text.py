"""Parser of HLO text: computations, instructions with their arrays, and how often each computation runs."""

import functools
import itertools
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4, "token": 0, "opaque": 0}
_MODULE = re.compile(r"\s*HloModule ([\w.-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?)\s([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_CALL = re.compile(r"\b(body|condition|calls|to_apply)=%([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r" constant\((\d+)\)")
# Computations that run where their caller runs; the others (`to_apply` of a reduction) are a few scalars.
_RUN = {"call": ("to_apply", "calls"), "async-start": ("calls",), "fusion": ("calls",), "while": ("body", "condition")}


class Array(NamedTuple):
    """An array of a type; `scratch` is True in a TPU's vector memory."""

    dtype: str
    shape: tuple[int, ...]
    scratch: bool

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype) if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits / 8


class Instruction(NamedTuple):
    """An instruction: `arrays` are its results, `operands` the names it reads, `calls` pairs (role, computation)."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: tuple[tuple[str, str], ...]
    root: bool
    text: str

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays if not array.scratch)


class Program:
    """A program: `computations` is `{name: {instruction name: Instruction}}`, `entry` the name of the first to run.

    `name` is that of the module, such as `jit_train_step`.
    """

    def __init__(self, text: str) -> None:
        module = _MODULE.match(text)
        self.name = module[1] if module else ""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry: str | None = None
        inside = None
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                inside = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif inside is not None and (instruction := _instruction(line)):
                inside[instruction.name] = instruction
        self.entry = self.entry or next(reversed(self.computations))

    def instructions(self) -> list[Instruction]:
        """Every instruction of every computation."""
        return [instruction for computation in self.computations.values() for instruction in computation.values()]

    @functools.cached_property
    def runs(self) -> dict[str, tuple[int, bool]]:
        """`{computation: (times it runs in one run of the program, whether only in fusions)}`."""
        runs: dict[str, tuple[int, bool]] = {}
        pending = [(self.entry, 1, False)]
        while pending:
            name, times, fused = pending.pop()
            before, was_fused = runs.get(name, (0, True))
            runs[name] = before + times, was_fused and fused
            for instruction in self.computations[name].values():
                turns = self.turns(instruction) if instruction.op == "while" else 1
                pending += [
                    (called, times * turns, fused or instruction.op == "fusion")
                    for called in self._runs_in(instruction)
                ]
        return runs

    def turns(self, loop: Instruction) -> int:
        """Trip count of a while loop: as the compiler states it, else the constant in its condition.

        1 where there is neither, because the count depends on data.
        """
        if trip_count := _TRIPS.search(loop.text):
            return int(trip_count[1])
        condition = self.computations.get(dict(loop.calls).get("condition"), {})
        constants = [_CONSTANT.search(instruction.text) for instruction in condition.values()]
        bounds = [int(constant[1]) for constant in constants if constant]
        return max(bounds, default=1) or 1

    def _runs_in(self, instruction):
        roles = _RUN.get(instruction.op, ())
        called = [name for role, name in instruction.calls if role in roles or role == "branch"]
        return [name for name in called if name in self.computations]

    @functools.cached_property
    def in_loops(self) -> set[str]:
        """The computations that run once an iteration of some loop."""
        pending = [name for loop in self.instructions() for role, name in loop.calls if role == "body"]
        looped = set()
        while pending:
            name = pending.pop()
            if name not in looped:
                looped.add(name)
                called = (call for caller in self.computations.get(name, {}).values() for call in caller.calls)
                pending += [inner for _, inner in called if inner in self.computations]
        return looped


def _instruction(line):
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    root, name, result_type, op = match.groups()
    operands, rest = _balanced(line, match.end())
    calls = list(_CALL.findall(rest))
    for indexed, true_or_false in _BRANCHES.findall(rest):
        calls += [("branch", called) for called in _NAME.findall(indexed or true_or_false)]
    names = tuple(_NAME.findall(operands))
    return Instruction(name, op, arrays(result_type), names, tuple(calls), bool(root), line.strip())


def _balanced(line, start):
    """Splits a line behind an opening parenthesis: the text up to the closing one, and the text after it."""
    depth = 1
    for parenthesis in re.finditer(r"[()]", line[start:]):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return line[start : start + parenthesis.start()], line[start + parenthesis.end() :]
    return line[start:], ""


def arrays(text: str) -> tuple[Array, ...]:
    """Parses the arrays of a type; `(f32[8]{0}, s32[])` has two."""
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(1)" in layout and ":T(" in layout)
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


_IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_COUNTED = re.compile(rf"replica_groups={_IOTA}")
_MESHED = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(?(?:\[([\d,]+)\](?:T\(([\d,]+)\))?|\{?([\d, ]+)\}?)\)?)? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


def groups(text: str, count: int) -> list[tuple[int, ...]]:
    """Parses the device groups of a collective, tuples of indices; one group of all `count` where it names none.

    A permutation has pairs (sender, receiver).
    """
    if match := _PAIRS.search(text) or _LISTED.search(text):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1].replace(" ", ""))]
    if match := _COUNTED.search(text):
        shape, dims, order = (_numbers(text) for text in match.groups())
        return _rows(_transposed(dims, order), shape[-1])
    if match := _MESHED.search(text):
        return _mesh_groups(*match.groups())
    return [tuple(range(count))]


def _mesh_groups(axes, dims, order, listed, over):
    """Groups over named axes of a mesh: `mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}`."""
    sizes = {name: int(size) for name, size in re.findall(r"['\"]([^'\"]+)['\"]=(\d+)", axes)}
    chosen = re.findall(r"['\"]([^'\"]+)['\"]", over)
    if dims:
        ids = _transposed(_numbers(dims), _numbers(order))
    else:
        ids = _numbers(listed) or list(range(math.prod(sizes.values())))
    groups_by_key = {}
    for index, place in enumerate(itertools.product(*(range(size) for size in sizes.values()))):
        key = tuple(at for name, at in zip(sizes, place, strict=True) if name not in chosen)
        groups_by_key.setdefault(key, []).append(ids[index])
    return [tuple(group) for group in groups_by_key.values()]


def _transposed(dims, order):
    """0, 1, ... laid out as an array of `dims`, its axes put in `order`, row by row."""
    order = order or list(range(len(dims)))
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    places = itertools.product(*(range(dims[axis]) for axis in order))
    return [sum(at * strides[axis] for at, axis in zip(place, order, strict=True)) for place in places]


def _rows(ids, width):
    return [tuple(ids[start : start + width]) for start in range(0, len(ids), width)]


def _numbers(text):
    return [int(number) for number in text.split(",")] if text else []
