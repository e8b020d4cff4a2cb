"""What a step on hardware costs: from its compiled program, or from its shapes alone where no compiler is there.

What is sent between devices is then `plan.collectives`', where its formula holds.
"""

import dataclasses

from efficientllm.plan import collectives, steps
from efficientllm.plan import roofline as rooflines
from efficientllm.registry import build


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step's cost. Bytes are one device's, FLOPs all devices'; None is not known.

    source: `compiler` or `shapes`.
    """

    source: str
    memory: dict
    by_shapes: int
    model_flops: float
    program_flops: float | None
    moved_bytes: float | None
    collectives: tuple | None
    custom_calls: dict
    kernels: dict
    compile_s: float | None
    refused: str | None
    roofline: rooflines.Roofline

    @property
    def total_bytes(self):
        return self.memory.get("total_bytes")


def estimate(one, hardware, count):
    """The Estimate of a `steps.Step`: compiled where the compiler is installed."""
    trace, used = steps.traced(one)
    by_shapes, executed = one.by_shapes(), steps.program_flops(one, trace)
    if not hardware.has_compiler:
        memory, seconds, refused, calls = {"total_bytes": by_shapes}, None, None, {}
        sent, moved = collectives.closed(one), None
    else:
        done = steps.compile_step(one, trace)
        memory, seconds, refused = done.memory, done.seconds, done.refused
        sent, moved, calls = steps.read(done, count) if done.text else (None, None, {})
    dtype = str(build("precision", one.lm.precision).product)
    work = one.model_flops if executed is None else executed
    return Estimate(
        source="compiler" if hardware.has_compiler else "shapes",
        memory=memory,
        by_shapes=by_shapes,
        model_flops=one.model_flops,
        program_flops=executed,
        moved_bytes=moved,
        collectives=sent,
        custom_calls=calls,
        kernels=used,
        compile_s=seconds,
        refused=refused,
        roofline=rooflines.roofline(hardware, count, dtype, work, moved, sent),
    )


def total_bytes(one, hardware):
    """Bytes that a device needs for a step, by the compiler where it is installed; None where it gives none."""
    if not hardware.has_compiler:
        return one.by_shapes()
    return steps.compile_step(one, steps.traced(one)[0]).memory.get("total_bytes")
