"""Candidates of training, planned by shapes: rematerialization, micro-batches and mesh of each technique.

Tracing the loss is what takes time (seconds a technique), so a setting is planned when it is asked for. Activations
are affine in the rows of a micro-batch: two traces give them for every micro-batch.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from efficientllm import model, registry, sharding
from efficientllm.config.field_keys import name_keys
from efficientllm.cost import formulas, step_memory
from efficientllm.errors import UserError
from efficientllm.plan import hardware as hardwares
from efficientllm.plan import roofline as rooflines
from efficientllm.plan import training_step
from efficientllm.quant import apply as quant
from efficientllm.recommend import costs
from efficientllm.recommend.costs import Candidate
from efficientllm.recommend.request import PRESETS, Changes, Request
from efficientllm.recommend.techniques import Technique
from efficientllm.run_description import describe_run
from efficientllm.weights import Precision, resident_bytes

REMAT = ("none", "full")


class TrainingPlanner:
    """Plans the steps of a Request; `batch` are changes that every candidate has, such as the rows of its evidence."""

    def __init__(self, request: Request, batch: Changes | None = None):
        self.request = request
        self.batch = _whole_rows(request, batch or {})
        self.devices = hardwares.devices(request.hardware, request.devices)
        self._steps: dict[tuple[Technique, str], training_step.Step] = {}
        self._activations: dict[tuple, int] = {}

    @functools.cached_property
    def parameters(self) -> float:
        """Parameters of the model that is asked for, with the technique of the task's preset."""
        return formulas.count_parameters(*self._base)["total"]

    @functools.cached_property
    def _base(self):
        """`(model, boxed parameters)` of the asked model."""
        return self._model(self.request.config(PRESETS[self.request.task], self.batch))

    def _model(self, config):
        with name_keys(config):
            lm = describe_run(config, self.devices, shapes_only=True).lm
        return lm, model.abstract_params(lm)

    def least_memory(self, technique: Technique) -> float:
        """Bytes of a device that a technique needs at least: its weights. Nothing is traced."""
        config = self.request.config(technique.config, dict(technique.changes) | self.batch)
        if self.request.task == "tune":
            return self._form_bytes(config.quant) / self.request.devices
        return 0.0

    def least_seconds(self, technique: Technique) -> float:
        """Seconds that a step takes at least: its FLOPs at the peak. Nothing is traced."""
        config = self.request.config(technique.config, dict(technique.changes) | self.batch)
        method = registry.build("adapter", config.adapter, where="config.adapter")
        lm, boxed = self._base if self.request.task == "tune" else self._model(config)
        if method.unrolled:
            lm, boxed = self._unrolled
        flops = formulas.step_flops(lm, boxed, config.train.length, config.train.batch_size, method)
        dtype = str(Precision.of(lm.precision).product)
        line = rooflines.roofline(self.request.hardware, self.request.devices, dtype, flops, None, None)
        return line.seconds or 0.0

    @functools.lru_cache(maxsize=64)  # noqa: B019  a planner lives as long as its program
    def _form_bytes(self, form):
        return resident_bytes(quant.abstract(nn.unbox(self._base[1]), form))

    @functools.cached_property
    def _unrolled(self):
        """The asked model with unrolled layers, as a method that freezes some of them needs it."""
        lm = self._base[0].clone(scan=False)
        return lm, model.abstract_params(lm)

    def settings(self, technique: Technique) -> list[Changes]:
        """The settings to try, from what should be fastest to what should need least memory."""
        fixed = self.request.fixed
        config = self.request.config(technique.config, dict(technique.changes) | self.batch)
        meshes = [{}] if "mesh" in fixed or self.request.devices == 1 else [{"mesh": m} for m in self._meshes()]
        remats = [{}] if "model.remat" in fixed else [{"model.remat": name} for name in REMAT]
        micros = _divisors(config.train.batch_size // self.request.devices)  # a row of each on every device
        counts = [{}] if "train.accumulate" in fixed else [{"train.accumulate": n} for n in micros]
        return [mesh | remat | count for remat in remats for mesh in meshes for count in counts]

    def _meshes(self):
        count, per_host = self.request.devices, self.request.hardware.per_host or self.request.devices
        meshes = [f"data={count}", f"fsdp={count}"]
        if 1 < per_host < count and count % per_host == 0:
            meshes.insert(1, f"data={count // per_host}, fsdp={per_host}")
        return meshes

    def plan(self, technique: Technique, setting: Changes) -> Candidate:
        """Plans a technique in a setting. Raises UserError where it cannot be trained so."""
        changes = self.batch | setting
        step = self._step(technique, setting.get("mesh", ""))
        config = self.request.config(technique.config, dict(technique.changes) | changes)
        remat = config.model.remat
        parts = self._parts(technique, step, setting.get("mesh", ""), remat, config.train)
        flops, traffic = step.model_flops, parts
        if remat != "none":  # the forward pass runs twice, and what it makes anew is written and read all the same
            flops += config.train.batch_size * formulas.forward_flops(step.lm, step.boxed, step.length)
            traffic = self._parts(technique, step, setting.get("mesh", ""), "none", config.train)
        seconds = costs.seconds_of(self.request, step, flops, _moved(traffic, config.train.accumulate))
        metrics = costs.shared_metrics(self.request, step, seconds, sum(parts.values()))
        metrics["params_total"] = self.parameters
        return Candidate(technique, changes, metrics)

    def workload(self, candidate: Candidate) -> training_step.Step:
        """The workload of a candidate, for a compiler."""
        config = self.request.config(candidate.technique.config, candidate.all_changes)
        with name_keys(config):
            return training_step.describe(
                config, self.devices, self.request.hardware.platform, self.request.hardware.capability
            )

    def _step(self, technique, mesh):
        """The step without rematerialization and micro-batches, whose trees all settings of a mesh share."""
        if (technique, mesh) not in self._steps:
            changes = dict(technique.changes) | self.batch | ({"mesh": mesh} if mesh else {})
            config = self.request.config(technique.config, changes)
            with name_keys(config):
                self._steps[technique, mesh] = training_step.describe(
                    config, self.devices, self.request.hardware.platform, self.request.hardware.capability
                )
        return self._steps[technique, mesh]

    def _parts(self, technique, step, mesh, remat, train):
        weights = sharding.local_bytes((step.shaped.params, step.shaped.frozen))
        gradients, rows = sharding.local_bytes(step.shaped.params), step.config.train.batch_size // train.accumulate
        optimizer = sharding.local_bytes(step.shaped) - weights
        activations = -(-self._activation_bytes(step, remat, rows) // step.rows[1])
        return {"weights": weights, "optimizer": optimizer, "gradients": gradients, "activations": activations}

    def _activation_bytes(self, step, remat, rows):
        """Activations of a micro-batch of `rows` rows; from two traces, where more would be needed."""
        shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (step.shaped.params, step.shaped.frozen))
        alike = jax.tree_util.tree_structure(step.shaped.params), str(jax.tree.leaves(shapes)), remat
        whole = step.config.train.batch_size
        bytes_by_rows = {n: self._activations[*alike, n] for n in (whole, 1) if (*alike, n) in self._activations}
        for n in (whole, 1):
            if n not in bytes_by_rows and (n == rows or rows not in (whole, 1)):
                lm = step.lm.clone(remat=remat)
                with step.scope():
                    bytes_by_rows[n] = step_memory.activation_bytes(lm, step.shaped, n, step.length, step.objective)
                self._activations[*alike, n] = bytes_by_rows[n]
        if rows in bytes_by_rows:
            return bytes_by_rows[rows]
        return round(bytes_by_rows[1] + (bytes_by_rows[whole] - bytes_by_rows[1]) * (rows - 1) / (whole - 1))


def _whole_rows(request, batch):
    """The changes of every candidate, with as many rows as the devices divide. Raises UserError for a fixed batch."""
    size = request.config(PRESETS[request.task], batch).train.batch_size
    if size % request.devices == 0:
        return batch
    rounded = size + -size % request.devices
    if "train.batch_size" in request.fixed:
        raise UserError(
            f"config.train.batch_size = {size}: {request.devices} devices do not divide it; {rounded} would do"
        )
    return batch | {"train.batch_size": rounded}


def _moved(parts, accumulate):
    """Memory traffic of a step on a device, as `step_memory.moved_bytes` counts it."""
    passes = 2 * parts["weights"] + 2 * parts["activations"] + parts["gradients"]
    return accumulate * passes + 3 * parts["gradients"] + 2 * parts["optimizer"]


def _divisors(number) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
