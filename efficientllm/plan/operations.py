"""Operations of a compiled program by kind: products, attention, scans, loss, optimizer, copies, collectives.

Kinds come from the instruction and from the scopes (`jax.named_scope`) in its `op_name`. A fusion counts as the most
expensive operation in it.
"""

import collections
import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Mapping

from efficientllm.plan import hlo_cost, hlo_flops
from efficientllm.plan.hlo_text import Program

# `attention` and `scan` hold their products too, as a fused kernel does; `products` are all others.
KINDS = ("products", "attention", "scan", "loss", "optimizer", "copies", "collectives", "other")
_SCOPES = ("attention", "scan", "loss", "optimizer")
_COPIES = (
    *("copy", "transpose", "reshape", "concatenate", "slice", "dynamic-slice", "dynamic-update-slice", "pad"),
    *("reverse", "bitcast-convert", "copy-start", "copy-done"),
)
# Not operations of a fusion that say what it is for.
_SILENT = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "broadcast", "iota")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_BATCHED = re.compile(r"\b(?:lhs_batch_dims=\{\d|\"lhs_batch_dimensions\":\[\"\d)")
_SCOPE = re.compile(rf"(?<![\w.])({'|'.join(_SCOPES)})(?![\w.])")
_WRAPPED = re.compile(r"(?:jvp|transpose|vmap)\((.*)\)")
_CALLS = ("checkpoint", "rematted_computation", "closed_call", "while", "body", "cond", "shard_map")


class Operation(typing.NamedTuple):
    """An instruction that runs by itself, outside of fusions.

    label:  the module or function that it belongs to, such as `ffn/down`; "" where the compiler keeps no name.
    times:    how often the program runs it.
    flops:    of its products, each time; None where its kernel does not show them.
    bytes:    read and written, each time.
    kernels:  launched each time: none to wait for an asynchronous one.
    """

    name: str
    kind: str
    label: str
    times: float
    flops: float | None
    bytes: float
    kernels: int


class Peaks(typing.NamedTuple):
    """FLOP/s and byte/s of a device, None where unknown, and how many devices of the program share them (CPUs)."""

    flops: float | None
    bandwidth: float | None
    shared_by: int = 1

    def least_s(self, flops: float | None, moved: float) -> float | None:
        """The least time by roofline; None where a peak is not known."""
        if self.flops is None or self.bandwidth is None:
            return None
        return self.shared_by * max((flops or 0) / self.flops, moved / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class KindTotal:
    """All operations of a kind in one run of a program on one device.

    seconds:    measured, or least by roofline; None where neither is known.
    flops:      None where a kernel does not show all of its own.
    kernels:    how many operations run.
    bound:      the peak that takes longest: FLOP/s or byte/s; None where neither is known.
    of_peak:    the rate as a share of that peak; None without a measured time.
    costliest:  the label that takes most of `seconds`, and its share of them.
    """

    kind: str
    seconds: float | None
    flops: float | None
    bytes: float
    kernels: int
    bound: str | None = None
    of_peak: float | None = None
    costliest: str = ""


def of_program(program: Program) -> list[Operation]:
    """Lists the operations of a program."""
    operations = []
    for name, (times, fused) in program.runs.items():
        if not fused:
            computation = program.computations[name]
            readers = _readers(computation)
            operations += [
                _operation(program, computation, readers, instruction, times)
                for instruction in computation.values()
                if instruction.op not in hlo_cost.FREE
            ]
    return operations


def _operation(program, computation, readers, instruction, times):
    heaviest, flops = _heaviest(program, computation, instruction)
    names = [_op_name(heaviest) or _op_name(instruction)]
    if not names[0]:  # XLA drops the names of products that it rewrites
        names = [_op_name(neighbour) for neighbour in _neighbours(computation, readers, instruction)] or [""]
        if hlo_flops.is_product(heaviest):
            # Of those beside attention the ones of batches, heads, are its own; the others are linear maps.
            if _BATCHED.search(heaviest.text):
                names.sort(key=lambda name: _scope(name) != "attention")
            else:
                names = [_without_scope(name) for name in names]
    kind = _kind(program, instruction, heaviest, _scope(names[0]))
    moved = hlo_cost.instruction_bytes(program, computation, instruction)
    kernels = int(hlo_cost.starts_kernel(instruction))
    return Operation(instruction.name, kind, _label(names[0]), times, flops, moved, kernels)


def _readers(computation):
    """`{name: [instructions that read it]}`."""
    readers = collections.defaultdict(list)
    for instruction in computation.values():
        for name in instruction.operands:
            readers[name].append(instruction)
    return readers


def _neighbours(computation, readers, instruction):
    """The nearest instructions with names that read the result, then those that make the operands."""
    after = _named(instruction, lambda reached: readers[reached.name])
    before = _named(
        instruction, lambda reached: [computation[name] for name in reached.operands if name in computation]
    )
    return [neighbour for neighbour in (*after, *before) if neighbour.op != "parameter"]


def _named(instruction, follow):
    """Instructions with names, reached by `follow` through at most two without."""
    named, reached = [], [instruction]
    for _ in range(3):
        reached = [neighbour for origin in reached for neighbour in follow(origin)]
        named += [neighbour for neighbour in reached if _op_name(neighbour)]
        reached = [neighbour for neighbour in reached if not _op_name(neighbour)]
    return named


def _heaviest(program, computation, instruction):
    """`(the instruction that names the operation, FLOPs)`: of a fusion its largest product, else its largest array."""
    inner = list(_inner(program, instruction))
    if not inner:
        return instruction, hlo_flops.product_flops(computation, instruction)
    flops = [hlo_flops.product_flops(body, candidate) for body, candidate in inner]
    if None in flops:
        return inner[flops.index(None)][1], None
    if any(flops):
        return inner[flops.index(max(flops))][1], sum(flops)
    speaking = [candidate for _, candidate in inner if candidate.op not in _SILENT]
    return _of_commonest_scope(speaking) if speaking else instruction, 0


def _of_commonest_scope(instructions):
    """The largest instruction of the scope that makes most elements; what is no copy goes first."""
    computing = [candidate for candidate in instructions if candidate.op not in _COPIES] or instructions
    sizes: collections.Counter[str] = collections.Counter()
    for candidate in computing:
        sizes[_scope(_op_name(candidate))] += _elements(candidate)
    scope = max(sizes, key=sizes.get)
    return max((candidate for candidate in computing if _scope(_op_name(candidate)) == scope), key=_elements)


def _elements(instruction):
    return sum(math.prod(array.shape) for array in instruction.arrays)


def _inner(program, instruction):
    """`(computation, instruction)` of all that a fusion or an asynchronous call holds."""
    roles = ("calls",) if instruction.op in ("fusion", "async-start") else ()
    for role, name in instruction.calls:
        body = program.computations.get(name, {}) if role in roles else {}
        for inner in body.values():
            yield body, inner
            yield from _inner(program, inner)


def _kind(program, instruction, heaviest, scope):
    operations = [instruction, *(inner for _, inner in _inner(program, instruction))]
    if any(_base(operation) in hlo_cost.COLLECTIVES for operation in operations):
        return "collectives"
    if hlo_flops.is_product(heaviest):
        return scope if scope in ("attention", "scan") else "products"
    return "copies" if heaviest.op in _COPIES else scope


def _base(instruction):
    return instruction.op.removesuffix("-start").removesuffix("-done")


def _scope(op_name):
    """The innermost scope of a name; `other` without one."""
    scopes = _SCOPE.findall(op_name)
    return scopes[-1] if scopes else "other"


def _without_scope(op_name):
    """The name up to its scope: that of the module which calls attention."""
    match = _SCOPE.search(op_name)
    return f"{op_name[: match.start()]}product" if match else op_name


def _op_name(instruction):
    match = _OP_NAME.search(instruction.text)
    return match[1].partition(";")[0] if match else ""


def _label(op_name):
    """The last two modules of `jit(step)/jvp(LM)/.../block_0/ffn/ffn.call/down/dot_general`: `ffn/down`."""
    *modules, _ = op_name.split("/")
    names = [_unwrapped(module) for module in modules]
    named = [name for name in names if name.isidentifier() and name not in _CALLS]
    return "/".join(re.sub(r"\d+", "*", name) for name in named[-2:])


def _unwrapped(module):
    """`LM` of `transpose(jvp(LM))`."""
    while match := _WRAPPED.fullmatch(module):
        module = match[1]
    return module


def by_kind(
    operations: Iterable[Operation], peaks: Peaks, seconds: Mapping[str, float] | None = None
) -> list[KindTotal]:
    """Sums operations by kind, the costliest first; `seconds` are measured, by the name of an operation."""
    groups: dict[str, list[Operation]] = collections.defaultdict(list)
    for operation in operations:
        groups[operation.kind].append(operation)
    rows = [_row(kind, group, peaks, seconds) for kind, group in groups.items()]
    return sorted(rows, key=lambda row: (row.seconds or 0, row.bytes), reverse=True)


def _row(kind, operations, peaks, seconds):
    flops = [None if operation.flops is None else operation.times * operation.flops for operation in operations]
    moved = [operation.times * operation.bytes for operation in operations]
    if seconds is None:
        times = [peaks.least_s(*work) for work in zip(flops, moved, strict=True)]
    else:
        times = [seconds.get(operation.name, 0.0) for operation in operations]
    costs = moved if None in times else times
    row = KindTotal(
        kind=kind,
        seconds=None if None in times else sum(times),
        flops=None if None in flops else sum(flops),
        bytes=sum(moved),
        kernels=round(sum(operation.times * operation.kernels for operation in operations)),
        costliest=_costliest(operations, costs),
    )
    return dataclasses.replace(row, **_of_peak(row, peaks, seconds is not None))


def _costliest(operations, costs):
    sums: collections.Counter[str] = collections.Counter()
    for operation, cost in zip(operations, costs, strict=True):
        sums[operation.label or operation.name.rpartition("/")[2].split(".")[0]] += cost
    label, cost = sums.most_common(1)[0]
    total = sum(costs)
    return f"{label} {cost / total:.0%}" if total else label


def _of_peak(row, peaks, is_measured):
    sides = {
        "FLOP/s": peaks.shared_by * (row.flops or 0) / peaks.flops if peaks.flops else 0.0,
        "byte/s": peaks.shared_by * row.bytes / peaks.bandwidth if peaks.bandwidth else 0.0,
    }
    bound = max(sides, key=sides.get)
    of_peak = sides[bound] / row.seconds if is_measured and row.seconds and sides[bound] else None
    return {"bound": bound if sides[bound] else None, "of_peak": of_peak}
