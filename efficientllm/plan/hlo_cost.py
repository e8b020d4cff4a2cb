"""What a compiled program costs, read off its text: bytes of memory it moves, collectives, kernels of others."""

import collections
import dataclasses
import re

from efficientllm.plan import hlo_text

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What moves nothing: names for what is there, and what runs elsewhere.
_FREE = (
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
    bytes:   of its larger side on one device, each time.
    groups:  the devices among which it runs, as tuples of their numbers.
    """

    kind: str
    times: int
    bytes: float
    groups: tuple

    @property
    def wire_bytes(self):
        """Bytes that a device sends, each time, in a ring: the least that the result needs."""
        n = max(len(group) for group in self.groups)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(self.kind, (n - 1) / n)
        return self.bytes * share


def collectives(program, count):
    """The Collectives of a program for `count` devices.

    What one channel does is counted once: a TPU's compiler writes a collective anew for each part of it that it hides.
    Channel 1 is none: JAX writes it on every collective of its shard_maps.
    """
    found, channels = [], {}
    for name, (times, _) in program.runs.items():
        for each in program.computations[name].values():
            kind = each.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if name.startswith("all-reduce-scatter"):  # how a TPU's program spells it: a fusion of a sum and a slice
                kind = "reduce-scatter"
            groups = tuple(hlo_text.groups(each.text, count))
            one = Collective(kind, times, _payload(program.computations[name], each, kind, groups), groups)
            channel = _CHANNEL.search(each.text)
            if channel is None or channel[1] == "1":
                found.append(one)
            else:
                before = channels.get((kind, channel[1]))
                channels[kind, channel[1]] = max(before, one, key=_volume) if before else one
    return [one for one in (*found, *channels.values()) if max(map(len, one.groups)) > 1]


def _volume(collective):
    return collective.times * collective.bytes


def _payload(computation, instruction, kind, groups):
    taken = sum(array.bytes for array in _operands(computation, instruction))
    return taken * max(map(len, groups)) if kind == "all-gather" else taken


def by_kind(found):
    """`{kind: {"count", "bytes", "wire_bytes"}}` of a step, bytes those of one device."""
    totals = collections.defaultdict(lambda: {"count": 0, "bytes": 0, "wire_bytes": 0})
    for one in found:
        total = totals[one.kind]
        total["count"] += one.times
        total["bytes"] += round(one.times * one.bytes)
        total["wire_bytes"] += round(one.times * one.wire_bytes)
    return dict(sorted(totals.items()))


def custom_calls(program):
    """`{target: times}` of the kernels that XLA did not write itself."""
    found = collections.Counter()
    for name, (times, _) in program.runs.items():
        for each in program.computations[name].values():
            if each.op.startswith("custom-call") and (target := _CALLED.search(each.text)):
                found[target[1]] += times
    return dict(sorted(found.items()))


def launches(program):
    """How many kernels a run starts: instructions outside of fusions that are more than names."""
    return sum(
        times
        * sum(each.op not in _FREE and not each.op.endswith("-done") for each in program.computations[name].values())
        for name, (times, fused) in program.runs.items()
        if not fused
    )


def moved_bytes(program):
    """Bytes that a run reads from and writes to a device's memory.

    Each instruction outside of fusions reads its operands and writes its result once, a slice what it takes of them,
    and what a TPU holds in its own vector memory is not counted. Caches can make it less, kernels of several passes
    more.
    """
    return sum(
        times * _moved(program, program.computations[name], each)
        for name, (times, fused) in program.runs.items()
        if not fused
        for each in program.computations[name].values()
    )


def _moved(program, computation, each):
    op = each.op
    if op in _FREE:
        return 0
    if op == "fusion":
        return _fusion(program, computation, each)
    read = [array.bytes for array in _operands(computation, each) if not array.scratch]
    if op.endswith("-start"):
        return sum(read)
    if op.endswith("-done") or op in ("broadcast", "iota"):
        return each.bytes
    if op in _SLICES:
        return 2 * each.bytes
    if op == "dynamic-update-slice":
        return 2 * _bytes(computation, each.operands[1:2])
    if op == "scatter":
        return 3 * _bytes(computation, each.operands[len(each.arrays) + 1 :])
    return sum(read) + each.bytes


def _fusion(program, computation, each):
    """A fusion reads of an operand what its slices take, and writes of a result that it updates in place the update."""
    body = next((program.computations[name] for role, name in each.calls if role == "calls"), None)
    if body is None:
        return _bytes(computation, each.operands) + each.bytes
    parameters = sorted(
        (int(re.search(r"parameter\((\d+)\)", inner.text)[1]), inner)
        for inner in body.values()
        if inner.op == "parameter"
    )
    users = collections.defaultdict(list)
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)
    read = sum(_read(inner, users) for _, inner in parameters)
    root = next((inner for inner in body.values() if inner.root), None)
    return read + (each.bytes if root is None else _written(body, root))


def _read(parameter, users):
    """Bytes of a fusion's parameter that are read: all, unless every use of it is a slice or an update in place."""
    total, waiting = 0, [parameter]
    while waiting:
        one = waiting.pop()
        for user in users[one.name]:
            if user.op in ("bitcast", "reshape"):
                waiting.append(user)
            elif user.op in _SLICES and user.operands[0] == one.name:
                total += user.bytes
            elif not (user.op == "dynamic-update-slice" and user.operands[0] == one.name):
                return parameter.bytes
    return min(total, parameter.bytes)


def _written(body, root):
    if root.op == "tuple":
        return sum(_written(body, body[name]) for name in root.operands)
    if root.op == "bitcast" and root.operands and root.operands[0] in body:
        return _written(body, body[root.operands[0]])
    return _bytes(body, root.operands[1:2]) if root.op == "dynamic-update-slice" else root.bytes


def _operands(computation, instruction):
    return [array for name in instruction.operands if name in computation for array in computation[name].arrays]


def _bytes(computation, names):
    return sum(computation[name].bytes for name in names if name in computation)
