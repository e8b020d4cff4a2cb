"""Trajectories of a fixed v(x, t) against diffusers' schedulers, over eight steps."""

import numpy as np
import pytest

from efficientllm.objectives.ddpm import DDPM as Diffusion
from efficientllm.objectives.flow import Flow
from solvers.test_tables import field, solver, start, trajectory

pytestmark = pytest.mark.slow  # importing diffusers takes 7 s
TABLE, TRAJECTORY = 1e-6, 1e-4


@pytest.fixture(scope="module")
def schedulers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


def theirs(scheduler, x, step=None, outputs=3):
    """x after each step of a scheduler, of the same predictions of the same arrays."""
    import torch

    x, steps = torch.tensor(x, dtype=torch.float32), []
    for t in scheduler.timesteps:
        prediction = torch.tensor(field(x.numpy(), np.float32(t), outputs), dtype=torch.float32)
        if outputs == 6:  # channels are theirs' second axis
            prediction, x = (array.movedim(-1, 1) for array in (prediction, x))
        x = scheduler.step(prediction, t, x, **(step or {})).prev_sample
        x = x.movedim(1, -1) if outputs == 6 else x
        steps.append(x.numpy())
    return np.stack(steps)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=TRAJECTORY, atol=TRAJECTORY * np.abs(expected).max())


def test_ddim(schedulers):
    scheduler = schedulers.DDIMScheduler(clip_sample=False)
    np.testing.assert_allclose(scheduler.alphas_cumprod, Diffusion().schedule.alpha_bars, rtol=3e-5, atol=TABLE)
    scheduler.set_timesteps(8)
    ours, (x, _) = solver("ddim(steps=8)"), start(7)
    assert scheduler.timesteps.tolist() == ours.tables(Diffusion())["level"].tolist()
    close(trajectory(ours, Diffusion(), x), theirs(scheduler, x))


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_euler(schedulers, shift):
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours, (x, _) = solver(f"euler(steps=8, shift={shift}, levels='sd3')"), start(8)
    scheduler.set_timesteps(8)
    tables = ours.tables(Flow())
    np.testing.assert_allclose(np.diff(scheduler.sigmas), tables["prediction"], atol=TABLE)
    np.testing.assert_allclose(scheduler.timesteps, tables["level"], rtol=TABLE)
    close(trajectory(ours, Flow(), x), theirs(scheduler, x))


@pytest.mark.parametrize("steps", (1, 2, 8, 10))
def test_unipc(schedulers, steps):
    """Wan's settings: sigmas shifted once, and levels truncated to whole numbers."""
    scheduler = schedulers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    ours, (x, _) = solver(f"unipc(steps={steps}, shift=3.0)"), start(10)
    scheduler.set_timesteps(steps)
    tables = ours.tables(Flow())
    assert scheduler.timesteps.tolist() == tables["level"].tolist()
    np.testing.assert_allclose(scheduler.sigmas[:-1], tables["sigma"], atol=TABLE)
    close(trajectory(ours, Flow(), x), theirs(scheduler, x))


@pytest.mark.parametrize("variance, theirs_", [("posterior", "fixed_small"), ("learned", "learned_range")])
def test_ancestral(schedulers, monkeypatch, variance, theirs_):
    """With the noise of both replaced by the same arrays. Theirs clamps a variance of 0 and adds no noise there."""
    import torch
    from diffusers.schedulers import scheduling_ddpm

    scheduler = schedulers.DDPMScheduler(variance_type=theirs_, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(8)
    x, noises = start(9)
    draws = iter(torch.tensor(noises, dtype=torch.float32))
    outputs = 6 if variance == "learned" else 3

    def draw(*args, **kwargs):
        return next(draws).movedim(-1, 1) if outputs == 6 else next(draws)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draw)
    ours = solver(f"ddpm(steps=8, variance={variance!r})")
    assert scheduler.timesteps.tolist() == ours.tables(Diffusion())["level"].tolist()
    close(trajectory(ours, Diffusion(), x, noises, outputs), theirs(scheduler, x, outputs=outputs))
