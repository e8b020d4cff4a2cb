"""Candidates of inference, planned by shapes: forms of the weights, KV caches and batches. No program is traced."""

from __future__ import annotations

import functools

import flax.linen as nn

from efficientllm import model, sharding
from efficientllm.config.field_keys import name_keys
from efficientllm.cost import formulas
from efficientllm.infer import setup as infer
from efficientllm.plan import hardware as hardwares
from efficientllm.plan import serving, workloads
from efficientllm.plan.request import ServingWorkload
from efficientllm.plan.text_request import TextRequest
from efficientllm.quant import apply as quant
from efficientllm.recommend import costs
from efficientllm.recommend.costs import Candidate
from efficientllm.recommend.request import PRESETS, Changes, Request
from efficientllm.recommend.techniques import Technique
from efficientllm.run_description import describe_run
from efficientllm.weights import box_as

BATCHES = (1, 4, 16, 64)


class ServingPlanner:
    """Plans the requests of a Request; `batch` are changes that every candidate has, such as the rows of its evidence.

    Layers stay stacked: they have the bytes and FLOPs of unrolled ones, and shapes of 28 layers are found at once.
    """

    def __init__(self, request: Request, batch: Changes | None = None):
        self.request, self.batch = request, batch or {}
        self.devices = hardwares.devices(request.hardware, request.devices)

    @property
    def parameters(self) -> float:
        """Parameters of the model that is asked for."""
        return self._parameters

    @functools.cached_property
    def _parameters(self):
        config = self.request.config(PRESETS["infer"], self.batch)
        return formulas.count_parameters(*self._model(config))["total"]

    def least_memory(self, technique: Technique) -> float:
        """0: a plan takes no time, so that none is left out beforehand."""
        return 0.0

    least_seconds = least_memory

    def settings(self, technique: Technique) -> list[Changes]:
        """The settings to try, from the smallest batch."""
        fixed = self.request.fixed | self.batch.keys()
        batches = [{}] if "infer.batch_size" in fixed else [{"infer.batch_size": rows} for rows in BATCHES]
        count = self.request.devices
        meshes = [{}] if count == 1 or "mesh" in fixed else [{"mesh": f"tensor={count}"}, {"mesh": f"data={count}"}]
        return [mesh | batch for mesh in meshes for batch in batches]

    def plan(self, technique: Technique, setting: Changes) -> Candidate:
        """Plans a technique in a setting. Raises UserError where it cannot be served so."""
        changes = self.batch | setting
        config = self.request.config(technique.config, dict(technique.changes) | changes)
        with name_keys(config):
            infer.check_request(config)
            mesh = sharding.make_mesh(config.mesh, self.devices)
            infer.check_mesh(config, mesh, "text", ("infer",))
            lm, boxed = self._model(config)
            shaped = sharding.abstract_shards(box_as(boxed, self._form(config.quant)), mesh)
        hardware = self.request.hardware
        workload = TextRequest(config, lm, mesh, boxed, shaped, hardware.platform, hardware.capability)
        prefill, head, decode = (
            costs.seconds_of(self.request, workload, flops, moved) for flops, moved in workload.phases()
        )
        is_timed = None not in (prefill, head, decode)
        seconds = prefill + head + config.infer.max_new_tokens * decode if is_timed else None
        metrics = costs.shared_metrics(self.request, workload, seconds, workload.by_shapes())
        if is_timed:
            metrics |= {"ttft_s": prefill + head, "tpot_s": decode, "tokens_per_s": workload.samples / decode}
        return Candidate(technique, changes, metrics | {"params_total": self.parameters})

    def workload(self, candidate: Candidate) -> ServingWorkload:
        """The workload of a candidate, for a compiler."""
        config = self.request.config(candidate.technique.config, candidate.all_changes)
        with name_keys(config):
            return serving.describe(
                config, self.devices, self.request.hardware.platform, self.request.hardware.capability
            )

    def _model(self, config):
        """`(model, boxed parameters)`, which only the KV cache and the precision distinguish among candidates."""
        key, hardware = (config.model.kv_cache, config.model.precision), self.request.hardware
        if key not in self._models:
            with name_keys(config), workloads.compile_target(hardware.platform, hardware.capability):
                lm = describe_run(config, self.devices, shapes_only=True).lm
            self._models[key] = lm, model.abstract_params(lm)
        return self._models[key]

    @functools.cached_property
    def _models(self) -> dict[tuple[str, str], tuple]:
        return {}

    @functools.lru_cache(maxsize=256)  # noqa: B019  a planner lives as long as its program
    def _form(self, form):
        _, boxed = self._models[next(iter(self._models))]
        return quant.abstract(nn.unbox(boxed), form)
