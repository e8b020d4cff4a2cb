"""Reads the text of a compiled program: its computations, what each instruction makes, and how often it runs."""

import functools
import itertools
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4, "token": 0, "opaque": 0}
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
    """`scratch` is True for one that lies in a TPU's own vector memory."""

    dtype: str
    shape: tuple
    scratch: bool

    @property
    def bytes(self):
        bits = BITS.get(self.dtype) if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits / 8


class Instruction(NamedTuple):
    """`arrays` are what it makes, `operands` the names of what it reads, `calls` pairs of (role, computation)."""

    name: str
    op: str
    arrays: tuple
    operands: tuple
    calls: tuple
    root: bool
    text: str

    @property
    def bytes(self):
        return sum(array.bytes for array in self.arrays if not array.scratch)


class Program:
    """`computations` are `{name: {instruction name: Instruction}}`, `entry` the name of the one that runs."""

    def __init__(self, text):
        self.computations, self.entry = {}, None
        inside = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                inside = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif inside is not None and (made := _instruction(line)):
                inside[made.name] = made
        self.entry = self.entry or next(reversed(self.computations))

    def instructions(self):
        """Every instruction of every computation."""
        return [each for computation in self.computations.values() for each in computation.values()]

    @functools.cached_property
    def runs(self):
        """`{computation: (times in one run of the program, whether in a fusion)}`; loops count their turns."""
        found = {}
        waiting = [(self.entry, 1, False)]
        while waiting:
            name, times, fused = waiting.pop()
            before, was_fused = found.get(name, (0, True))
            found[name] = before + times, was_fused and fused
            for each in self.computations[name].values():
                turns = self.turns(each) if each.op == "while" else 1
                waiting += [(called, times * turns, fused or each.op == "fusion") for called in self._runs_in(each)]
        return found

    def turns(self, loop):
        """How often a while loop's body runs: as the compiler says, or the bound its condition compares with; one turn
        where there is neither, as for loops over what only the data tell."""
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = self.computations.get(dict(loop.calls).get("condition"), {})
        bounds = [int(found[1]) for each in condition.values() if (found := _CONSTANT.search(each.text))]
        return max(bounds, default=1) or 1

    def _runs_in(self, instruction):
        roles = _RUN.get(instruction.op, ())
        called = [name for role, name in instruction.calls if role in roles or role == "branch"]
        return [name for name in called if name in self.computations]

    @functools.cached_property
    def in_loops(self):
        """The computations that run once an iteration of some loop."""
        waiting = [name for each in self.instructions() for role, name in each.calls if role == "body"]
        looped = set()
        while waiting:
            name = waiting.pop()
            if name not in looped:
                looped.add(name)
                called = (call for each in self.computations.get(name, {}).values() for call in each.calls)
                waiting += [inner for _, inner in called if inner in self.computations]
        return looped


def _instruction(line):
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, made, op = found.groups()
    operands, rest = _balanced(line, found.end())
    calls = list(_CALL.findall(rest))
    for several, one in _BRANCHES.findall(rest):
        calls += [("branch", called) for called in _NAME.findall(several or one)]
    names = tuple(_NAME.findall(operands))
    return Instruction(name, op, arrays(made), names, tuple(calls), bool(root), line.strip())


def _balanced(line, start):
    """What stands from `start` to the parenthesis that closes, and what comes after."""
    depth = 1
    for found in re.finditer(r"[()]", line[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return line[start : start + found.start()], line[start + found.end() :]
    return line[start:], ""


def arrays(text):
    """The arrays of a type, as `(f32[8]{0}, s32[])` has two."""
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


def groups(text, count):
    """The groups of devices among which a collective runs, tuples of their numbers; all `count` where none are named.

    A permutation's are the pairs of sender and receiver.
    """
    if found := _PAIRS.search(text) or _LISTED.search(text):
        return [tuple(map(int, one.split(","))) for one in re.findall(r"\{([\d,]+)\}", found[1].replace(" ", ""))]
    if found := _COUNTED.search(text):
        shape, dims, order = (_numbers(part) for part in found.groups())
        return _rows(_transposed(dims, order), shape[-1])
    if found := _MESHED.search(text):
        return _mesh_groups(*found.groups())
    return [tuple(range(count))]


def _mesh_groups(axes, dims, order, listed, over):
    """Groups over named axes of a mesh: `mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}`."""
    sizes = {name: int(size) for name, size in re.findall(r"['\"]([^'\"]+)['\"]=(\d+)", axes)}
    chosen = re.findall(r"['\"]([^'\"]+)['\"]", over)
    if dims:
        ids = _transposed(_numbers(dims), _numbers(order))
    else:
        ids = _numbers(listed) or list(range(math.prod(sizes.values())))
    found = {}
    for index, place in enumerate(itertools.product(*(range(size) for size in sizes.values()))):
        key = tuple(at for name, at in zip(sizes, place, strict=True) if name not in chosen)
        found.setdefault(key, []).append(ids[index])
    return [tuple(group) for group in found.values()]


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
