"""What a step or a request on hardware costs: from its compiled programs, or from shapes where no compiler is there.

What is sent between devices is then `plan.collectives`', where its formula holds.
"""

import dataclasses
import math

from efficientllm.plan import roofline as rooflines
from efficientllm.plan import training_step
from efficientllm.weights import Precision


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A cost. Bytes are one device's, FLOPs all devices'; None is not known.

    source: `compiler` or `shapes`.
    parts:  of what is made of several programs, `{name: (how often it runs, its Estimate)}`.
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
    parts: dict = dataclasses.field(default_factory=dict)

    @property
    def total_bytes(self):
        return self.memory.get("total_bytes")


def estimate(one, hardware, count):
    """The Estimate of a `steps.Step`, or of what else is planned: compiled where the compiler is installed."""
    found = {part.name: (part.times, _part(one, part, hardware, count)) for part in one.programs()}
    return next(iter(found.values()))[1] if len(found) == 1 else _together(found)


def _part(one, part, hardware, count):
    by_shapes, executed = one.by_shapes(), training_step.program_flops(one, part)
    if not hardware.has_compiler:
        memory, seconds, refused, calls = {"total_bytes": by_shapes}, None, None, {}
        sent, moved, launched = one.sent_by_formula(), part.moved_bytes, None
    else:
        done = training_step.compile_step(one, part.trace)
        memory, seconds, refused = done.memory, done.seconds, done.refused
        sent, moved, calls, launched = training_step.read(done, count) if done.text else (None, None, {}, None)
    dtype = str(Precision.of(one.lm.precision).product)
    work = part.model_flops if executed is None else executed
    return Estimate(
        source="compiler" if hardware.has_compiler else "shapes",
        memory=memory,
        by_shapes=by_shapes,
        model_flops=part.model_flops,
        program_flops=executed,
        moved_bytes=moved,
        launches=launched if hardware.platform == "gpu" else None,  # elsewhere instructions start no kernels
        collectives=sent,
        custom_calls=calls,
        kernels=part.kernels,
        compile_s=seconds,
        refused=refused,
        roofline=rooflines.roofline(hardware, count, dtype, work, moved, sent, launched),
    )


def _together(parts):
    """The Estimate of several programs that run one after another: the memory of the one that needs most."""
    found = [each for _, each in parts.values()]
    largest = max(found, key=lambda each: math.inf if each.total_bytes is None else each.total_bytes)
    sent = None
    if all(each.collectives is not None for each in found):
        sent = tuple(
            dataclasses.replace(one, times=one.times * times)
            for times, each in parts.values()
            for one in each.collectives
        )
    return Estimate(
        source=largest.source,
        memory=largest.memory,
        by_shapes=largest.by_shapes,
        model_flops=_sum(parts, "model_flops"),
        program_flops=_sum(parts, "program_flops"),
        moved_bytes=_sum(parts, "moved_bytes"),
        launches=_sum(parts, "launches"),
        collectives=sent,
        custom_calls=_sum_calls(parts),
        kernels={key: sorted({k for each in found for k in each.kernels.get(key, ())}) for key in _keys(found)},
        compile_s=None if found[0].compile_s is None else sum(each.compile_s for each in found),
        refused=next((each.refused for each in found if each.refused), None),
        roofline=rooflines.Chain(tuple((times, each.roofline) for times, each in parts.values())),
        parts=parts,
    )


def _sum(parts, key):
    values = [(times, getattr(each, key)) for times, each in parts.values()]
    return None if any(value is None for _, value in values) else sum(times * value for times, value in values)


def _keys(found):
    return sorted({key for each in found for key in each.kernels})


def _sum_calls(parts):
    names = sorted({name for _, each in parts.values() for name in each.custom_calls})
    return {name: sum(times * each.custom_calls.get(name, 0) for times, each in parts.values()) for name in names}


def total_bytes(one, hardware):
    """Bytes that a device needs, by the compiler where it is installed; None where it gives none."""
    if not hardware.has_compiler:
        return one.by_shapes()
    totals = [training_step.compile_step(one, part.trace).memory.get("total_bytes") for part in one.programs()]
    return None if None in totals else max(totals)
