"""Reads the text of a compiled program: which arrays it makes, in which computations."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d+)\[([\d,]+)\]")
_CALLS = re.compile(r"\b(\w+)=%([\w.-]+)")


class Instruction(NamedTuple):
    """`shapes` are those of the arrays it makes; `in_loop` says whether it stands in the body of a while loop."""

    op: str
    shapes: tuple
    in_loop: bool
    text: str


def instructions(text):
    """Every instruction of a module that makes an array."""
    lines, name = {}, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            lines[name] = []
        elif name:
            lines[name].append(line)
    looped = _in_loops(lines)
    return [
        Instruction(found[2], _shapes(found[1]), name in looped, line.strip())
        for name, body in lines.items()
        for line in body
        if (found := _INSTRUCTION.match(line))
    ]


def _shapes(text):
    return tuple(tuple(int(size) for size in sizes.split(",")) for _, sizes in _ARRAY.findall(text))


def _in_loops(lines):
    """The computations that run once an iteration of some loop."""
    calls = {name: [call for line in body for call in _CALLS.findall(line)] for name, body in lines.items()}
    waiting = [called for found in calls.values() for role, called in found if role == "body"]
    looped = set()
    while waiting:
        name = waiting.pop()
        if name not in looped:
            looped.add(name)
            waiting += [called for _, called in calls.get(name, ()) if called in lines]
    return looped
