"""`PictureRequest`, a workload of plans: the steps of a solver for a batch of pictures, and decoding their latents."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping

import jax

from efficientllm import sharding
from efficientllm.embeds.patches import Denoiser
from efficientllm.infer import picture_row
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.image_samples import describe_batch, image_shape
from efficientllm.infer.picture_costs import PictureCosts
from efficientllm.metrics.reading import Reading
from efficientllm.plan.hlo_cost import Collective
from efficientllm.plan.request import ServingWorkload
from efficientllm.plan.workloads import TracedProgram
from efficientllm.runtime import kernel_choice
from efficientllm.sharding import local_bytes
from efficientllm.weights import resident_bytes

TEXT, STEP, DECODE = "text", "step", "decode"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRequest(ServingWorkload):
    """A batch of `config.infer.batch_size` pictures; `encoder` decodes their latents, None samples pixels."""

    lm: Denoiser
    sampler: DiffusionSampler
    encoder: typing.Any

    @functools.cached_property
    def costs(self) -> PictureCosts:
        return PictureCosts(self.sampler, self.boxed, self.encoder)

    @property
    def tokens(self) -> int:
        """Patches of the pictures of a request."""
        return self.samples * self.costs.tokens

    @property
    def units(self) -> dict[str, float]:
        """Units of work of a request, of which cost and CO2 are told (`record.price_and_carbon`)."""
        return {"image": self.samples}

    @property
    def heading(self) -> str:
        guided = "" if self.sampler.rows_per_image == 1 else ", guided"
        pictures = describe_batch(self.lm, self.samples)
        return f"{pictures} in {self.sampler.steps} steps{guided}, as {self.config.quant}"

    def programs(self) -> list[TracedProgram]:
        """The traced programs of a request: the keys and values of its texts, solver steps, and decoding."""
        shape, rows = image_shape(self.lm), self.samples
        with self.scope(), kernel_choice.recording_kernels() as used:
            step = self.sampler.trace(self.shaped, rows, shape, count=1)
        kernels = {name: sorted(kinds) for name, kinds in used.items()}
        programs = [
            *self._shared_by_steps(),
            TracedProgram(STEP, self.sampler.steps, step, kernels, rows * self.costs.step_flops, self.moved),
        ]
        if self.encoder is not None:
            with self.scope(), kernel_choice.recording_kernels() as used:
                decode = self._trace_decode()
            kernels = {name: sorted(kinds) for name, kinds in used.items()}
            # Its weights are replicated: devices share the pictures alone.
            how = {"precision": self.encoder.precision, "shards": sharding.count_row_shards(self.mesh)}
            programs.append(TracedProgram(DECODE, 1, decode, kernels, rows * self.costs.decode_flops, **how))
        return programs

    def _shared_by_steps(self):
        if not self.costs.request_flops:
            return []
        with self.scope():
            traced = self.sampler.trace_request(self.shaped, self.samples)
        return [TracedProgram(TEXT, 1, traced, {}, self.samples * self.costs.request_flops)]

    def _trace_decode(self):
        latents_BhwC = self.costs.latents(self.samples)
        latents_BhwC = sharding.shapes(latents_BhwC, ("batch", *(None,) * (latents_BhwC.ndim - 1)))
        params = sharding.shapes(self.encoder.abstract_params(), _replicated(self.encoder.abstract_params()))
        return jax.jit(self.encoder.decode_with).trace(params, latents_BhwC)

    @functools.cached_property
    def moved(self) -> float:
        """Bytes that a device moves in a step at least: its share of the weights, and its pictures."""
        rows = self.samples // sharding.count_row_shards(self.mesh)
        pictures = self.costs.picture_bytes(rows)
        weights = self.costs.step_bytes(self.shaped, rows) - pictures
        return weights * local_bytes(self.shaped) / self.weights + pictures

    @functools.cached_property
    def memory_parts(self) -> dict[str, int]:
        """Bytes of a device by part, from shapes: weights, the autoencoder's, and the arrays of a step and of decoding
        that exist at once.

        The mesh axes `tensor` and `sequence` are not subtracted from the arrays of a step, nor offloading from weights.
        """
        rows = self.samples // sharding.count_row_shards(self.mesh)
        with self.scope():
            parts = {"weights": local_bytes(self.shaped), "step": self.costs.live_bytes(rows)}
            if self.encoder is None:
                return parts
            autoencoder = resident_bytes(self.encoder.abstract_params())
            return parts | {"autoencoder": autoencoder, "decoding": self.costs.decode_live_bytes(rows)}

    def by_shapes(self) -> int:
        """Bytes of memory of a device, from shapes: of a step, or of decoding if that needs more.

        With `config.infer.offload` the weights of one of them are there at a time.
        """
        parts = {"autoencoder": 0, "decoding": 0} | self.memory_parts
        if self.config.infer.offload:
            return max(parts["weights"] + parts["step"], parts["autoencoder"] + parts["decoding"])
        return parts["weights"] + parts["autoencoder"] + max(parts["step"], parts["decoding"])

    def sent_by_formula(self) -> tuple[Collective, ...] | None:
        """Collectives by closed formula: none where devices share the pictures alone; None for other meshes."""
        return () if self.mesh.size == self.mesh.shape["data"] else None

    def rates(self, seconds: float) -> dict[str, float]:
        """The study's throughput if a request takes `seconds`; it counts pictures."""
        return {"it_tokens_per_s": self.samples / seconds}

    def latencies(self, estimates: Mapping[str, typing.Any]) -> dict[str, float | None]:
        """Least latency of a picture by roofline; `estimates` are the `parts` of the Estimate."""
        seconds = [(times, estimate.roofline.seconds) for times, estimate in estimates.values()]
        is_known = all(phase_s is not None for _, phase_s in seconds)
        return {"image_latency_s": sum(times * phase_s for times, phase_s in seconds) if is_known else None}

    def readings(self) -> dict[str, Reading]:
        """Readings of the model itself."""
        weights = Reading(self.weights, "bytes", "parameter tree")
        return {**picture_row.flops(self.costs), "resident_weight_bytes": weights}


def _replicated(tree):
    return jax.tree.map(lambda leaf: (None,) * leaf.ndim, tree)
