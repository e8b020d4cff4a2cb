"""Cost estimates of a training step or request on some hardware: from its compiled programs, or from shapes.

Shapes are used where the hardware's compiler is not installed; collectives then come from the formula of
`plan.collectives`, where it holds.
"""

import dataclasses
import math

from efficientllm.plan import operations, workloads
from efficientllm.plan import roofline as rooflines
from efficientllm.plan.hardware import Hardware
from efficientllm.plan.operations import KindTotal
from efficientllm.plan.workloads import Workload
from efficientllm.weights import Precision


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a workload or of one of its programs. Bytes are of one device, FLOPs of all; None is unknown.

    source:     `compiler` or `shapes`.
    memory:     `metrics.memory.compiled_memory`, or only `total_bytes`.
    by_shapes:  bytes of memory estimated from shapes.
    refused:    why the compiler did not compile it, or None.
    operations: rows of `plan.operations`; empty without a compiler.
    parts:      for several programs, `{name: (how often it runs, its Estimate)}`.
    """

    source: str
    memory: dict
    by_shapes: int
    model_flops: float
    program_flops: float | None
    moved_bytes: float | None
    launches: int | None
    collectives: tuple | None
    custom_calls: dict
    kernels: dict
    compile_s: float | None
    refused: str | None
    roofline: rooflines.Roofline
    operations: tuple[KindTotal, ...] = ()
    parts: dict = dataclasses.field(default_factory=dict)

    @property
    def total_bytes(self) -> int | None:
        return self.memory.get("total_bytes")


def estimate(workload: Workload, hardware: Hardware, count: int) -> Estimate:
    """Estimates the cost of a `training_step.Step` or a `request.ServingWorkload` on `count` devices."""
    estimates = {
        program.name: (program.times, _part(workload, program, hardware, count)) for program in workload.programs()
    }
    times, only = next(iter(estimates.values()))
    return only if (len(estimates), times) == (1, 1) else _together(estimates)


def _part(workload, program, hardware, count):
    by_shapes, program_flops = workload.by_shapes(), workloads.program_flops(workload, program)
    if not hardware.has_compiler:
        memory, seconds, refused, costs = {"total_bytes": by_shapes}, None, None, None
        sent, moved, calls, launched = workload.sent_by_formula(), program.moved_bytes, {}, None
    else:
        compiled = workloads.compile_program(workload, program.trace)
        memory, seconds, refused = compiled.memory, compiled.seconds, compiled.refused
        costs = workloads.compiled_costs(compiled, count) if compiled.text else None
        sent, moved, calls, launched = costs[:4] if costs else (None, None, {}, None)
    dtype = str(Precision.of(program.precision or workload.lm.precision).product)
    flops = program.model_flops if program_flops is None else program_flops
    return Estimate(
        source="compiler" if hardware.has_compiler else "shapes",
        memory=memory,
        by_shapes=by_shapes,
        model_flops=program.model_flops,
        program_flops=program_flops,
        moved_bytes=moved,
        launches=launched if hardware.platform == "gpu" else None,  # elsewhere instructions start no kernels
        collectives=sent,
        custom_calls=calls,
        kernels=program.kernels,
        compile_s=seconds,
        refused=refused,
        roofline=rooflines.roofline(
            hardware, count, dtype, flops * count / (program.shards or count), moved, sent, launched
        ),
        operations=tuple(operations.by_kind(costs.operations, _peaks(hardware, count, dtype))) if costs else (),
    )


def _peaks(hardware, count, dtype):
    shared_by = count if hardware.platform == "cpu" else 1
    return operations.Peaks(hardware.peak_flops(dtype).value, hardware.bandwidth().value, shared_by)


def _together(programs):
    """The Estimate of programs that run one after another: costs are summed, memory is that of the largest program."""
    estimates = [estimate for _, estimate in programs.values()]
    largest = max(estimates, key=lambda estimate: math.inf if estimate.total_bytes is None else estimate.total_bytes)
    sent = None
    if all(estimate.collectives is not None for estimate in estimates):
        sent = tuple(
            dataclasses.replace(collective, times=collective.times * times)
            for times, estimate in programs.values()
            for collective in estimate.collectives
        )
    return Estimate(
        source=largest.source,
        memory=largest.memory,
        by_shapes=largest.by_shapes,
        model_flops=_sum(programs, "model_flops"),
        program_flops=_sum(programs, "program_flops"),
        moved_bytes=_sum(programs, "moved_bytes"),
        launches=_sum(programs, "launches"),
        collectives=sent,
        custom_calls=_sum_calls(programs),
        kernels={
            key: sorted({name for estimate in estimates for name in estimate.kernels.get(key, ())})
            for key in _keys(estimates)
        },
        compile_s=None if estimates[0].compile_s is None else sum(estimate.compile_s for estimate in estimates),
        refused=next((estimate.refused for estimate in estimates if estimate.refused), None),
        roofline=rooflines.Chain(tuple((times, estimate.roofline) for times, estimate in programs.values())),
        parts=programs,
    )


def _sum(estimates, key):
    values = [(times, getattr(estimate, key)) for times, estimate in estimates.values()]
    return None if any(value is None for _, value in values) else sum(times * value for times, value in values)


def _keys(estimates):
    return sorted({key for estimate in estimates for key in estimate.kernels})


def _sum_calls(estimates):
    names = sorted({name for _, estimate in estimates.values() for name in estimate.custom_calls})
    return {
        name: sum(times * estimate.custom_calls.get(name, 0) for times, estimate in estimates.values())
        for name in names
    }


def total_bytes(workload: Workload, hardware: Hardware) -> int | None:
    """Bytes of memory that a device needs, by the compiler or by shapes; None where the compiler gives no figure."""
    if not hardware.has_compiler:
        return workload.by_shapes()
    totals = [
        workloads.compile_program(workload, program.trace).memory.get("total_bytes") for program in workload.programs()
    ]
    return None if None in totals else max(totals)
