"""`ServingWorkload`, a workload of plans: what is served at once, from a config alone, compiled without arrays."""

from __future__ import annotations

import dataclasses
import functools
import typing

import flax.linen as nn

from efficientllm.model import Backbone
from efficientllm.plan import remedies, workloads
from efficientllm.plan.hlo_cost import Collective
from efficientllm.quant import apply as quant
from efficientllm.registry import lookup
from efficientllm.typing import Config, Mesh, PyTree
from efficientllm.weights import resident_bytes


@dataclasses.dataclass(frozen=True)
class ServingWorkload:
    """A batch of `config.infer.batch_size` requests; `text_request` and `picture_request` have its kinds.

    `boxed` are the abstract float32 parameters with their logical axes; `shaped` those in the form `config.quant`, with
    shardings.
    """

    config: Config
    lm: Backbone
    mesh: Mesh
    boxed: PyTree
    shaped: PyTree
    platform: str
    capability: tuple[int, int] = (0, 0)

    def scope(self) -> typing.ContextManager[None]:
        """Context to trace and compile in: the mesh, and kernels of the platform and compute capability."""
        return workloads.compile_scope(self.mesh, self.platform, self.capability)

    @property
    def samples(self) -> int:
        return self.config.infer.batch_size

    def programs(self) -> list[workloads.TracedProgram]:
        """The traced programs of the request."""
        raise NotImplementedError(f"{type(self).__name__} defines no programs()")

    def plain(self) -> ServingWorkload:
        """The same request with dense attention and unquantized weights, whose FLOPs can be counted in the jaxpr.

        It is traced for a TPU and never compiled; `training_step.Step.plain` says why.
        """
        changes = {"model.attention_kernel": "xla", "quant": "float32", "infer.rules": ()}
        config = workloads.with_changes(self.config, changes)
        return lookup("planned", "infer").describe(config, list(self.mesh.devices.flat), "tpu")

    @functools.cached_property
    def plain_programs(self) -> list[workloads.TracedProgram]:
        """The traced programs of `plain`."""
        return self.plain().programs()

    @functools.cached_property
    def weights(self) -> int:
        """Bytes of the parameters, each counted once."""
        return resident_bytes(self.shaped)

    def sent_by_formula(self) -> tuple[Collective, ...] | None:
        """Collectives by closed formula: none on one device; None on several, for which there is no formula."""
        return () if self.mesh.size == 1 else None

    def candidates(self) -> list[list[remedies.Change]]:
        """The config changes to try where it does not fit (`plan.remedies`)."""
        plain = nn.unbox(self.boxed)
        smaller = [
            form
            for form in remedies.FORMS
            if resident_bytes(quant.abstract(plain, form, self.config.infer.rules)) < self.weights
        ]
        return remedies.of_serving(self.config, smaller)

    no_rates: typing.ClassVar = ("it_tokens_per_s",)
    no_mcr: typing.ClassVar = "how good the weights still are in this form is measured"
