"""`Step`, a workload of plans: a training step, from its config alone, compiled ahead of time without arrays.

Kinds of workloads are registered as `planned`, each as a WorkloadKind. Its `describe` returns a workload: a Step, or
another class with the same methods (`request.ServingWorkload`).
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence

import jax

from efficientllm import model, sharding
from efficientllm.adapters.base import Method
from efficientllm.cost import formulas, step_memory
from efficientllm.metrics.reading import Reading
from efficientllm.objectives.base import Objective
from efficientllm.plan import collectives, planned_images, remedies
from efficientllm.plan.hlo_cost import Collective
from efficientllm.plan.workloads import TracedProgram, WorkloadKind, compile_scope, compile_target, with_changes
from efficientllm.registry import register
from efficientllm.run_description import describe_run
from efficientllm.runtime import kernel_choice
from efficientllm.train import step
from efficientllm.train.config_checks import check_rows, check_train, training_lm
from efficientllm.typing import Config, Mesh, PyTree


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step.

    boxed:      abstract parameters of the model without adapters, boxed with their logical axes.
    shaped:     the abstract TrainState, each leaf with its sharding.
    shardings:  the shardings alone, for `jax.jit`.
    """

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
        return compile_scope(self.mesh, self.platform, self.capability)

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
    def units(self) -> dict[str, float]:
        """Units of work of a step, of which cost and CO2 are told (`record.price_and_carbon`)."""
        image = {"image": self.samples} if self.objective.counted == "images" else {}
        return {"mtoken": self.tokens / 1e6, **image, "run": 1 / self.config.train.steps}

    @property
    def heading(self) -> str:
        counted = self.objective.counted
        return f"{self.samples} {'x' if counted == 'tokens' else f'{counted} of'} {self.length} tokens a step"

    def programs(self) -> list[TracedProgram]:
        """The traced programs of the step: one."""
        return [TracedProgram("step", 1, *traced(self), self.model_flops)]

    def plain(self) -> Step:
        """The same step with operators whose FLOPs can be counted in the jaxpr: dense attention, ragged products,
        unquantized weights, scans of known length.

        It is traced for a TPU, whatever the plan's hardware, and never compiled: grouped products are one ragged_dot
        there, elsewhere loops that run until the groups are done, a number which no jaxpr has.
        """
        config = with_changes(self.config, {"model.attention_kernel": "xla", "quant": "float32"})
        return describe(config, list(self.mesh.devices.flat), "tpu")

    @functools.cached_property
    def plain_programs(self) -> list[TracedProgram]:
        """The traced programs of `plain`."""
        return self.plain().programs()

    def sent_by_formula(self) -> tuple[Collective, ...] | None:
        """Collectives by closed formula; None where it does not hold."""
        return collectives.closed(self)

    def candidates(self) -> list[list[remedies.Change]]:
        """The config changes to try where it does not fit (`plan.remedies`)."""
        return remedies.of_training(self.config, self.mesh.shape)

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


def whole_rows(config: Config, mesh: Mesh) -> Config:
    """The config with its batch size rounded up to one that the mesh divides. Raises UserError."""
    check_rows(config.train)
    divisor = config.train.accumulate * sharding.count_row_shards(mesh)
    size = config.train.batch_size
    return config if size % divisor == 0 else with_changes(config, {"train.batch_size": size + -size % divisor})


def describe(
    config: Config, devices: Sequence[jax.Device], platform: str, capability: tuple[int, int] = (0, 0)
) -> Step:
    """Builds the Step of a config on `devices`, compiled for `platform` (a GPU with this compute capability)."""
    description = describe_run(config, devices, shapes_only=True)
    check_train(config.train, description.mesh, description.objective)
    with compile_target(platform, capability):
        lm = training_lm(description, planned_images.row_slots(description))
        boxed = model.abstract_params(lm)
        shaped, shardings = step.abstract_state(lm, config, boxed, description.method, description.mesh)
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
    with workload.scope(), kernel_choice.recording_kernels() as used:
        return jitted.trace(workload.shaped, batch), {operation: sorted(kinds) for operation, kinds in used.items()}


TRAINING = WorkloadKind(whole_rows, describe, ("pretrain", "tune"))
for task in ("pretrain", "tune"):
    register("planned", task)(TRAINING)
