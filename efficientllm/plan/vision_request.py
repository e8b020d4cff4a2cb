"""`VisionRequest`, a workload of plans: prompts with pictures, and their completions."""

from __future__ import annotations

import dataclasses
import functools
import typing

import jax

from efficientllm import sharding
from efficientllm.embeds.vision_language import VisionLM, encode_images
from efficientllm.infer.vision_serving import image_flops
from efficientllm.metrics.reading import Reading
from efficientllm.plan import workloads
from efficientllm.plan.planned_images import Grids
from efficientllm.plan.text_request import TextRequest
from efficientllm.runtime import kernel_choice
from efficientllm.vision.tower_rows import blank_image, tower_rows


@dataclasses.dataclass(frozen=True)
class VisionRequest(TextRequest):
    """A TextRequest whose prompts have pictures of `grids`; their tokens are among those of `prompt_length`."""

    lm: VisionLM
    grids: Grids = ()

    before_first_token: typing.ClassVar[tuple[str, ...]] = ("images", *TextRequest.before_first_token)

    @property
    def heading(self) -> str:
        tokens = sum(picture.tokens for picture in self._pictures)
        return f"{super().heading}, {len(self.grids)} pictures of {tokens:,} tokens in each"

    @functools.cached_property
    def _pictures(self):
        return [blank_image(self.lm.vision, grid) for grid in self.grids]

    def programs(self) -> list[workloads.TracedProgram]:
        """The traced programs of a request: the tower, then those of a prompt without pictures."""
        (row,) = jax.tree.map(lambda array: array[0], (tower_rows(self.lm.vision, [self._pictures]).patches,))
        axes = jax.tree.map(lambda array: ("batch", *(None,) * array.ndim), row)
        batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct((self.samples, *array.shape), array.dtype), row)
        encode = jax.jit(functools.partial(encode_images, self.lm))
        with self.scope(), kernel_choice.recording_kernels() as used:
            traced = encode.trace(self.shaped, sharding.shapes(batch, axes))
        kernels = {name: sorted(kinds) for name, kinds in used.items()}
        flops, moved = self.samples * self.flops_per_row, sharding.local_bytes(self.shaped["vision"])
        return [workloads.TracedProgram("images", 1, traced, kernels, flops, moved), *super().programs()]

    @property
    def flops_per_row(self) -> float:
        """Forward FLOPs of the tower for the pictures of a row."""
        return sum(image_flops(self.lm.vision, self.boxed["vision"], picture) for picture in self._pictures)

    def readings(self) -> dict[str, Reading]:
        flops = self.flops_per_row / len(self.grids)
        return super().readings() | {"flops_per_image": Reading(flops, "FLOP", "closed formula of the tower")}
