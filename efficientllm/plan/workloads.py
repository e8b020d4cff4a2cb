"""Workloads, what a plan is of: their kinds, their traced programs, and what the compiler says that one costs.

A workload is a training step (`training_step.Step`) or a request (`request.ServingWorkload`).
"""

import contextlib
import dataclasses
import re
import time
import typing
from collections.abc import Callable, Iterator

import jax

from efficientllm.cost import jaxpr_flops
from efficientllm.metrics import memory
from efficientllm.plan import cudnn_tracing, hlo_cost, hlo_text, operations
from efficientllm.plan.hlo_cost import Collective
from efficientllm.plan.operations import Operation
from efficientllm.plan.remedies import Change
from efficientllm.runtime import kernel_choice
from efficientllm.typing import Config, Mesh

Workload = typing.Any  # a `training_step.Step`, or another class with its methods (`request.ServingWorkload`)
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class WorkloadKind(typing.NamedTuple):
    """A kind of workload, registered as `planned` under a name of `config.plan.of`.

    whole:     `(config, mesh) -> config`, with a batch size that the mesh divides.
    describe:  `(config, devices, platform, capability) -> workload`, on a mesh of these devices.
    tasks:     tasks (`config.task`) whose measured rows calibrate it.
    """

    whole: Callable[[Config, Mesh], Config]
    describe: Callable[..., Workload]
    tasks: tuple[str, ...]


class TracedProgram(typing.NamedTuple):
    """A traced program of a workload.

    times:        how often it runs in a step or request.
    kernels:      `{operation: kernels}` it was traced with.
    model_flops:  FLOPs of one run by closed formula.
    moved_bytes:  memory traffic of one run on a device by closed formula, or None.
    turns:        iterations of its outer loops that count as one run; None where the jaxpr has the count.
    precision:    of its products (`config.model.precision`); "" is the model's.
    shards:       devices that share its work, which the others repeat; None is all.
    """

    name: str
    times: int
    trace: jax.stages.Traced
    kernels: dict[str, list[str]]
    model_flops: float
    moved_bytes: float | None = None
    turns: int | None = None
    precision: str = ""
    shards: int | None = None


@dataclasses.dataclass(frozen=True)
class CompiledWorkload:
    """Result of compiling a program.

    memory:   `memory.compiled_memory`, bytes of one device; only `total_bytes` where the compiler refused.
    refused:  why it would not compile, or None.
    text:     the HLO text, or None.
    """

    memory: dict[str, int]
    seconds: float
    text: str | None
    refused: str | None = None


@contextlib.contextmanager
def compile_target(platform: str, capability: tuple[int, int]) -> Iterator[None]:
    """Context in which kernels are chosen for the platform and, on a GPU, its compute capability."""
    with kernel_choice.compiling_for(platform, capability), cudnn_tracing.planned_for(capability):
        yield


@contextlib.contextmanager
def compile_scope(mesh: Mesh, platform: str, capability: tuple[int, int]) -> typing.Any:
    """Context with `mesh` in scope, in which kernels are chosen for the platform."""
    with jax.set_mesh(mesh), compile_target(platform, capability):
        yield


def with_changes(config: Config, changes: Change) -> Config:
    """A copy of the config with `changes`, such as `{"model.remat": "full"}`."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def compile_program(workload: Workload, trace: jax.stages.Traced) -> CompiledWorkload:
    """Compiles a trace -> CompiledWorkload. Out of memory in the compiler is reported in it; other errors raise."""
    begin = time.perf_counter()
    try:
        with workload.scope():
            compiled = trace.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return CompiledWorkload(_used(str(error)), time.perf_counter() - begin, None, str(error).splitlines()[0])
    return CompiledWorkload(memory.compiled_memory(compiled), time.perf_counter() - begin, compiled.as_text())


def _used(message):
    """The bytes that the compiler's error message names."""
    match = _USED.search(message)
    return {"total_bytes": round(float(match[1]) * _UNITS[match[2]])} if match else {}


def program_flops(workload: Workload, program: TracedProgram) -> float | None:
    """FLOPs of the matrix products in a program's jaxpr, including rematerialized and masked ones.

    Where custom kernels hide products, those of `workload.plain_programs` are counted. None where neither can be.
    """
    for programs in (lambda: [program], lambda: workload.plain_programs):
        try:
            countable = next(candidate for candidate in programs() if candidate.name == program.name)
            return jaxpr_flops.count_program_flops(countable.trace.jaxpr, program.turns)
        except ValueError:
            continue
    return None


class CompiledCosts(typing.NamedTuple):
    """Costs of one run of a compiled program on a device, from its text."""

    collectives: list[Collective]
    moved_bytes: float
    custom_calls: dict[str, int]
    launches: int
    operations: list[Operation]


def compiled_costs(compiled: CompiledWorkload, count: int) -> CompiledCosts:
    """Reads the costs of a compiled workload from its text."""
    program = hlo_text.Program(compiled.text)
    costs = hlo_cost.moved_bytes(program), hlo_cost.custom_calls(program), hlo_cost.launches(program)
    return CompiledCosts(hlo_cost.collectives(program, count), *costs, operations.of_program(program))
