"""Cost of a compiled program from its HLO text: bytes moved, collectives, custom calls, kernel launches."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

from efficientllm.plan import hlo_text

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Instructions that move no bytes themselves: aliases, and calls whose computations are counted.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier", "async-start", "async-update"),
    *("async-done", "get-dimension-size", "domain"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CALLED = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    kind:    of COLLECTIVES.
    times:   how often a step runs it.
    bytes:   of its input or output on one device, whichever is larger, each time.
    groups:  tuples of device indices that communicate.
    """

    kind: str
    times: int
    bytes: float
    groups: tuple[tuple[int, ...], ...]

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends each time in a ring algorithm, the minimum."""
        n = max(len(group) for group in self.groups)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(self.kind, (n - 1) / n)
        return self.bytes * share


def collectives(program: hlo_text.Program, count: int) -> list[Collective]:
    """The Collectives of a program for `count` devices.

    Collectives with the same channel are counted once: a TPU's compiler repeats one for each part that it overlaps with
    compute. Channel 1 is not unique: JAX gives it to every collective of a shard_map.
    """
    without_channel: list[Collective] = []
    by_channel: dict[tuple[str, str], Collective] = {}
    for name, (times, _) in program.runs.items():
        for instruction in program.computations[name].values():
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if name.startswith("all-reduce-scatter"):  # on TPUs a fusion of all-reduce and slice
                kind = "reduce-scatter"
            groups = tuple(hlo_text.groups(instruction.text, count))
            collective = Collective(
                kind, times, _payload(program.computations[name], instruction, kind, groups), groups
            )
            channel = _CHANNEL.search(instruction.text)
            if channel is None or channel[1] == "1":
                without_channel.append(collective)
            else:
                before = by_channel.get((kind, channel[1]))
                by_channel[kind, channel[1]] = max(before, collective, key=_volume) if before else collective
    return [item for item in (*without_channel, *by_channel.values()) if max(map(len, item.groups)) > 1]


def _volume(collective):
    return collective.times * collective.bytes


def _payload(computation, instruction, kind, groups):
    input_bytes = sum(array.bytes for array in _operands(computation, instruction))
    return input_bytes * max(map(len, groups)) if kind == "all-gather" else input_bytes


def by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Totals of a step, `{kind: {"count", "bytes", "wire_bytes"}}`; bytes are of one device."""
    totals: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0, "wire_bytes": 0})
    for collective in collectives:
        total = totals[collective.kind]
        total["count"] += collective.times
        total["bytes"] += round(collective.times * collective.bytes)
        total["wire_bytes"] += round(collective.times * collective.wire_bytes)
    return dict(sorted(totals.items()))


def custom_calls(program: hlo_text.Program) -> dict[str, int]:
    """`{target: times}` of custom calls: kernels of libraries, Pallas and others."""
    counts: collections.Counter[str] = collections.Counter()
    for name, (times, _) in program.runs.items():
        for instruction in program.computations[name].values():
            if instruction.op.startswith("custom-call") and (target := _CALLED.search(instruction.text)):
                counts[target[1]] += times
    return dict(sorted(counts.items()))


def starts_kernel(instruction: hlo_text.Instruction) -> bool:
    """Whether an instruction outside of fusions launches a kernel."""
    return instruction.op not in FREE and not instruction.op.endswith("-done")


def launches(program: hlo_text.Program) -> int:
    """Number of kernels that a run launches: instructions outside of fusions, without aliases."""
    return sum(
        times * sum(starts_kernel(instruction) for instruction in program.computations[name].values())
        for name, (times, fused) in program.runs.items()
        if not fused
    )


def moved_bytes(program: hlo_text.Program) -> float:
    """Bytes that a run reads from and writes to a device's memory.

    Each instruction outside of fusions reads its operands and writes its result once; a slice reads what it takes.
    Arrays in a TPU's vector memory are not counted. Caches can make the true figure smaller, kernels of several passes
    larger.
    """
    return sum(
        times * instruction_bytes(program, program.computations[name], instruction)
        for name, (times, fused) in program.runs.items()
        if not fused
        for instruction in program.computations[name].values()
    )


def instruction_bytes(
    program: hlo_text.Program, computation: dict[str, hlo_text.Instruction], instruction: hlo_text.Instruction
) -> float:
    """Bytes that one run of an instruction of `computation` reads and writes."""
    op = instruction.op
    if op in FREE:
        return 0
    if op == "fusion":
        return _fusion(program, computation, instruction)
    read = [array.bytes for array in _operands(computation, instruction) if not array.scratch]
    if op.endswith("-start"):
        return sum(read)
    if op.endswith("-done") or op in ("broadcast", "iota"):
        return instruction.bytes
    if op in _SLICES:
        return 2 * instruction.bytes
    if op == "dynamic-update-slice":
        return 2 * _bytes(computation, instruction.operands[1:2])
    if op == "scatter":
        return 3 * _bytes(computation, _updates(instruction))
    return sum(read) + instruction.bytes


def _fusion(program, computation, instruction):
    """Bytes of a fusion: of a sliced operand only the slices, of a result updated in place only the updates.

    A fused scatter has a parameter of its fusion as the operand, whose memory is that of the result.
    """
    body = next((program.computations[name] for role, name in instruction.calls if role == "calls"), None)
    if body is None:
        return _bytes(computation, instruction.operands) + instruction.bytes
    parameters = sorted(
        (int(re.search(r"parameter\((\d+)\)", inner.text)[1]), inner)
        for inner in body.values()
        if inner.op == "parameter"
    )
    users = collections.defaultdict(list)
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)
    read = sum(_read(body, inner, users) for _, inner in parameters)
    root = next((inner for inner in body.values() if inner.root), None)
    return read + (instruction.bytes if root is None else _written(body, root))


def _read(body, parameter, users):
    """Bytes read of a fusion's parameter: all, unless every use of it is a slice or an update in place.

    A slice may be of the converted parameter: what it takes is read as it is stored.
    """
    total, pending = 0.0, [parameter]
    width = parameter.bytes / max(1, sum(math.prod(array.shape) for array in parameter.arrays))
    while pending:
        value = pending.pop()
        for user in users[value.name]:
            if user.op in ("bitcast", "reshape", "convert"):
                pending.append(user)
            elif user.op in _SLICES and user.operands[0] == value.name:
                total += width * math.prod(user.arrays[0].shape)
            elif user.op == "scatter" and user.operands[0] == value.name:
                total += _bytes(body, _updates(user))  # the rows that updates are combined with
            elif not (user.op == "dynamic-update-slice" and user.operands[0] == value.name):
                return parameter.bytes
    return min(total, parameter.bytes)


def _written(body, root):
    if root.op == "tuple":
        return sum(_written(body, body[name]) for name in root.operands)
    if root.op == "bitcast" and root.operands and root.operands[0] in body:
        return _written(body, body[root.operands[0]])
    if root.op == "scatter":
        return _bytes(body, _updates(root))
    return _bytes(body, root.operands[1:2]) if root.op == "dynamic-update-slice" else root.bytes


def _updates(scatter):
    """Names of a scatter's updates: its operands are arrays, indices and updates, one update for each array."""
    return scatter.operands[len(scatter.arrays) + 1 :]


def _operands(computation, instruction):
    return [array for name in instruction.operands if name in computation for array in computation[name].arrays]


def _bytes(computation, names):
    return sum(computation[name].bytes for name in names if name in computation)
