"""Plans of serving: builds the request of a config, of prompts or of pictures as its objective reads."""

import typing
from collections.abc import Sequence

import flax.linen as nn
import jax

from efficientllm import model, sharding
from efficientllm.infer import image_samples, picture_setup, text_to_image_prompts
from efficientllm.infer import setup as infer
from efficientllm.plan import planned_images, workloads
from efficientllm.plan.picture_request import PictureRequest
from efficientllm.plan.request import ServingWorkload
from efficientllm.plan.text_request import TextRequest
from efficientllm.plan.vision_request import VisionRequest
from efficientllm.quant import apply as quant
from efficientllm.registry import register
from efficientllm.run_description import describe_run
from efficientllm.typing import Config, Mesh
from efficientllm.weights import box_as


def whole(config: Config, mesh: Mesh) -> Config:
    """Checks the config; a request's batch size stays as it is. Raises UserError."""
    infer.check_request(config)
    return config


def describe(
    config: Config, devices: Sequence[jax.Device], platform: str, capability: tuple[int, int] = (0, 0)
) -> ServingWorkload:
    """Builds the ServingWorkload of a config on `devices`, compiled for `platform`. Raises UserError."""
    description = describe_run(config, devices, shapes_only=True)
    reads = description.objective.reads
    infer.check_mesh(config, description.mesh, reads, ("infer",))
    infer.check_keys(config, reads)
    is_text, objective = reads == "text", typing.cast(typing.Any, description.objective)
    lm: typing.Any
    with workloads.compile_target(platform, capability):
        if is_text:
            lm = infer.serving_lm(description, config.infer.prompt_length + config.infer.max_new_tokens)
        else:
            if not config.text_states:
                text_to_image_prompts.check_no_prompts(description)
            lm = infer.serving_denoiser(picture_setup.with_size(description))
        boxed = model.abstract_params(lm)
    quantized = quant.abstract(nn.unbox(boxed), config.quant, config.infer.rules)
    shaped = sharding.abstract_shards(box_as(boxed, quantized), description.mesh)
    shared = {"config": config, "lm": lm, "mesh": description.mesh, "boxed": boxed, "shaped": shaped}
    shared |= {"platform": platform, "capability": capability}
    if is_text:
        grids = planned_images.grids(description, config.infer.prompt_length)
        return VisionRequest(**shared, grids=grids) if grids else TextRequest(**shared)
    sampler = image_samples.sampler_of(lm, config.infer, objective)
    return PictureRequest(**shared, sampler=sampler, encoder=objective.encoder)


SERVING = workloads.WorkloadKind(whole, describe, ("infer",))
register("planned", "infer")(SERVING)
