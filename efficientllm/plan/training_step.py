"""`Step`, a workload of plans: a training step, from its config alone, compiled ahead of time without arrays.

Kinds of workloads are registered as `planned`, each as a Planned. Its `describe` returns a workload: a Step, or another
class with the same methods (`request.Request`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from efficientllm import model, sharding
from efficientllm.adapters.base import Method
from efficientllm.cost import formulas, jaxpr_flops, step_memory
from efficientllm.metrics import memory
from efficientllm.metrics.reading import Reading
from efficientllm.objectives.base import Objective
from efficientllm.plan import collectives, cudnn, hlo_cost, hlo_text, planned_images
from efficientllm.plan import remedies as changes
from efficientllm.plan.hlo_cost import Collective
from efficientllm.registry import register
from efficientllm.run_description import describe_run
from efficientllm.runtime import kernel_choice as kernels
from efficientllm.train import step
from efficientllm.train.config_checks import check_rows, check_train, training_lm
from efficientllm.typing import Config, Mesh, PyTree

Workload = typing.Any  # a Step, or another class with its methods (`request.Request`)
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Planned(typing.NamedTuple):
    """A kind of workload.

    whole:     `(config, mesh) -> config`, with a batch size that the mesh divides.
    describe:  `(config, devices, platform, capability) -> workload`, on a mesh of these devices.
    tasks:     tasks (`config.task`) whose measured rows calibrate it.
    """

    whole: Callable[[Config, Mesh], Config]
    describe: Callable[..., Workload]
    tasks: tuple[str, ...]


class Part(typing.NamedTuple):
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
class Step:
    """A training step: model, tuning method, mesh, and the abstract TrainState with shardings."""

    config: Config
    lm: model.Backbone
    objective: Objective
    length: int
    method: Method
    mesh: Mesh
    boxed: PyTree
    shaped: step.TrainState
    shardings: step.TrainState
    platform: str
    capability: tuple[int, int] = (0, 0)

    def scope(self) -> typing.Any:
        """Context to trace and compile in: the mesh, and kernels of the platform and compute capability."""
        return scope(self.mesh, self.platform, self.capability)

    @property
    def rows(self) -> tuple[int, int]:
        """`(rows of a micro-batch, number of shards of its tokens)`."""
        train, shards = self.config.train, sharding.count_row_shards(self.mesh) * self.mesh.shape["sequence"]
        return train.batch_size // train.accumulate, shards

    @property
    def model_flops(self) -> float:
        """FLOPs of a step by closed formula."""
        train = self.config.train
        return formulas.step_flops(self.lm, self.boxed, self.length, train.batch_size, self.method)

    @property
    def samples(self) -> int:
        """Rows of a step."""
        return self.config.train.batch_size

    @property
    def heading(self) -> str:
        counted = self.objective.counted
        return f"{self.samples} {'x' if counted == 'tokens' else f'{counted} of'} {self.length} tokens a step"

    def programs(self) -> list[Part]:
        """The Parts of the step: one program."""
        return [Part("step", 1, *traced(self), self.model_flops)]

    def plain(self) -> Step:
        """The same step with operators whose FLOPs can be counted in the jaxpr: dense attention, ragged products,
        unquantized weights, scans of known length."""
        config = changed(self.config, {"model.attention_kernel": "xla", "quant": "float32"})
        return describe(config, list(self.mesh.devices.flat), "tpu")

    @functools.cached_property
    def plain_programs(self) -> list[Part]:
        """The Parts of `plain`."""
        return self.plain().programs()

    def sent_by_formula(self) -> tuple[Collective, ...] | None:
        """Collectives by closed formula; None where it does not hold."""
        return collectives.closed(self)

    def candidates(self) -> list[list[changes.Change]]:
        """The config changes to try where it does not fit (`plan.remedies`)."""
        return changes.of_training(self.config, self.mesh.shape)

    def rates(self, seconds: float) -> dict[str, float]:
        """The study's throughputs if a step takes `seconds`."""
        rate = self.samples / seconds / formulas.count_parameters(self.lm, self.boxed)["active"]
        counted = self.length if self.objective.counted == "tokens" else 1
        return {"tt_tokens_per_param_s": rate * counted, "st_samples_per_param_s": rate}

    def latencies(self, estimates: Mapping[str, typing.Any]) -> dict[str, float | None]:
        """None: a training step has no TTFT or TPOT."""
        return {}

    no_rates: typing.ClassVar = ("tt_tokens_per_param_s", "st_samples_per_param_s")
    no_mcr: typing.ClassVar = "nothing is compressed in training"

    def readings(self) -> dict[str, Reading]:
        """Readings of the model itself."""
        trainable = sum(leaf.size for leaf in jax.tree.leaves(self.shaped.params))
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shaped.all_params))
        formula = f"closed formula ({formulas.FLOP_CONVENTION})"
        per_image = {"flops_per_image": Reading(self.model_flops / self.samples, "FLOP", formula)}
        return {
            **(per_image if self.objective.counted == "images" else {}),
            "params_trainable": Reading(trainable, "1", "parameter tree"),
            "flops_per_token": Reading(self.model_flops / self.tokens, "FLOP", formula),
            "resident_weight_bytes": Reading(weights, "bytes", "parameter tree, over all devices"),
        }

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.samples * self.length

    @functools.cached_property
    def memory_parts(self) -> dict[str, int]:
        """Memory of a device in bytes by part, from shapes (`cost.step_memory`)."""
        with self.scope():
            return step_memory.predicted_parts(
                self.lm, self.shaped, self.rows[0], self.length, self.rows[1], self.objective
            )

    def by_shapes(self) -> int:
        """Peak memory of a device in bytes, from shapes: the sum of `memory_parts`."""
        return sum(self.memory_parts.values())


@dataclasses.dataclass(frozen=True)
class Compiled:
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
def target(platform: str, capability: tuple[int, int]) -> Iterator[None]:
    """Context in which kernels are chosen for the platform and, on a GPU, its compute capability."""
    with kernels.compiling_for(platform, capability), cudnn.planned_for(capability):
        yield


@contextlib.contextmanager
def scope(mesh: Mesh, platform: str, capability: tuple[int, int]) -> typing.Any:
    """Context with `mesh` in scope, in which kernels are chosen for the platform."""
    with jax.set_mesh(mesh), target(platform, capability):
        yield


def changed(config: Config, changes: changes.Change) -> Config:
    """A copy of the config with `changes`, such as `{"model.remat": "full"}`."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def whole_rows(config: Config, mesh: Mesh) -> Config:
    """The config with its batch size rounded up to one that the mesh divides. Raises UserError."""
    check_rows(config.train)
    divisor = config.train.accumulate * sharding.count_row_shards(mesh)
    size = config.train.batch_size
    return config if size % divisor == 0 else changed(config, {"train.batch_size": size + -size % divisor})


def describe(
    config: Config, devices: Sequence[jax.Device], platform: str, capability: tuple[int, int] = (0, 0)
) -> Step:
    """Builds the Step of a config on `devices`, compiled for `platform` (a GPU with this compute capability)."""
    description = describe_run(config, devices, shapes_only=True)
    check_train(config.train, description.mesh, description.objective)
    with target(platform, capability):
        lm = training_lm(description, planned_images.row_slots(description))
        shaped, shardings = step.abstract_state(lm, config, description.length, description.method, description.mesh)
        boxed = model.abstract_params(lm)
    objective, length = description.objective, description.length
    return Step(
        config,
        lm,
        objective,
        length,
        description.method,
        description.mesh,
        boxed,
        shaped,
        shardings,
        platform,
        capability,
    )


def traced(workload: Step) -> tuple[jax.stages.Traced, dict[str, list[str]]]:
    """Traces a Step -> `(trace, {operation: kernels} it was traced with)`."""
    train, objective = workload.config.train, workload.objective
    batch = objective.batch_shapes(workload.lm, train.batch_size, workload.length, workload.mesh)
    jitted = step.jit_train_step(workload.lm, train, workload.mesh, workload.shardings, workload.method, objective)
    with workload.scope(), kernels.recording_kernels() as used:
        return jitted.trace(workload.shaped, batch), {operation: sorted(kinds) for operation, kinds in used.items()}


def compile_step(workload: Workload, trace: jax.stages.Traced) -> Compiled:
    """Compiles a trace -> Compiled. Out of memory in the compiler is reported in it; other errors raise."""
    begin = time.perf_counter()
    try:
        with workload.scope():
            compiled = trace.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(_used(str(error)), time.perf_counter() - begin, None, str(error).splitlines()[0])
    return Compiled(memory.compiled_memory(compiled), time.perf_counter() - begin, compiled.as_text())


def _used(message):
    """The bytes that the compiler's error message names."""
    match = _USED.search(message)
    return {"total_bytes": round(float(match[1]) * _UNITS[match[2]])} if match else {}


def program_flops(workload: Workload, part: Part) -> float | None:
    """FLOPs of the matrix products in a Part's jaxpr, including rematerialized and masked ones.

    Where custom kernels hide products, those of `workload.plain_programs` are counted. None where neither can be.
    """
    for parts in (lambda: [part], lambda: workload.plain_programs):
        try:
            countable = next(program for program in parts() if program.name == part.name)
            return jaxpr_flops.count_program_flops(countable.trace.jaxpr, part.turns)
        except ValueError:
            continue
    return None


def read(compiled: Compiled, count: int) -> tuple[list[Collective], float, dict[str, int], int]:
    """`(Collectives, moved bytes, custom calls, launches)` of a Compiled, from its text."""
    program = hlo_text.Program(compiled.text)
    costs = hlo_cost.moved_bytes(program), hlo_cost.custom_calls(program), hlo_cost.launches(program)
    return hlo_cost.collectives(program, count), *costs


TRAINING = Planned(whole_rows, describe, ("pretrain", "tune"))
for task in ("pretrain", "tune"):
    register("planned", task)(TRAINING)
