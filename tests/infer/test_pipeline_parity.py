"""Pictures and clips of prompts against diffusers' pipelines, in float32 from the same noise."""

import jax
import numpy as np
import pytest

from efficientllm.infer.denoise import Carry
from infer import pipelines
from infer.pipelines import NEGATIVE, PROMPTS, torch

pytestmark = pytest.mark.xdist_group("encoders")

STEPS, GUIDANCE, LENGTH = 6, 5.0, 20
TOLERANCE = 1e-4  # float32 rounding of 6 guided steps, and of a decoder
SD3 = {"infer.size": (16, 12), "infer.solver": f"euler(steps={STEPS}, levels='sd3')"}
WAN = {"infer.size": (5, 16, 16), "infer.solver": f"unipc(steps={STEPS})"}


def by_us(serving, noise_BhwC):
    """Latents and pictures in [-1, 1] of all prompts."""
    with jax.set_mesh(serving.mesh):
        serving.prepare_requests()
        params, sampler = serving.load("float32"), serving.sampler
        request = sampler.request(params, *serving.prompts.wanted(np.arange(len(noise_BhwC))))
        keys_B = jax.random.split(jax.random.key(0), len(noise_BhwC))  # of no effect: the solver draws nothing
        carry = Carry(jax.numpy.asarray(noise_BhwC), sampler.solver.memory(noise_BhwC), keys_B)
        latents_BhwC = sampler.advance(params, request, carry, 0, sampler.steps).x_BhwC
        return np.asarray(latents_BhwC), np.clip(np.asarray(serving.decode(latents_BhwC)), -1, 1)


def by_diffusers(pipeline, noise_BhwC, **size):
    """The same of a pipeline, whose latents have their channels before frames and rows."""
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def watch(pipeline, step, time, values):
        seen.append(np.moveaxis(values["latents"].numpy(), 1, -1))
        return {}

    made = pipeline(
        list(PROMPTS), negative_prompt=[NEGATIVE] * len(PROMPTS), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=torch.from_numpy(np.moveaxis(noise_BhwC, -1, 1).copy()), output_type="np", max_sequence_length=LENGTH,
        callback_on_step_end=watch, **size,
    )  # fmt: skip
    return seen[-1], 2 * made[0] - 1


def compare(ours, theirs):
    for array, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(array, expected, atol=TOLERANCE)
        assert expected.std() > 0.1 and np.abs(expected[0] - expected[1]).max() > 100 * TOLERANCE


def test_stable_diffusion_3():
    serving = pipelines.described("image", **SD3 | {"infer.guidance": GUIDANCE})
    noise_BhwC = np.random.default_rng(0).normal(size=(2, 8, 6, 4)).astype(np.float32)
    theirs = by_diffusers(pipelines.stable_diffusion_3(), noise_BhwC, height=16, width=12)
    compare(by_us(serving, noise_BhwC), theirs)


@pytest.mark.slow
def test_wan():
    serving = pipelines.described("video", **WAN | {"infer.guidance": GUIDANCE})
    noise_BFhwC = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 4)).astype(np.float32)
    theirs = by_diffusers(pipelines.wan(), noise_BFhwC, height=16, width=16, num_frames=5)
    compare(by_us(serving, noise_BFhwC), theirs)
