"""Denoising diffusion implicit models: deterministic sampling in few steps."""

import dataclasses
import typing

import numpy as np

from efficientllm.registry import register
from efficientllm.solvers.base import LinearSolver, Tables
from efficientllm.solvers.spacing import SPACINGS, kept_steps


@register("solver", "ddim", choices={"spacing": SPACINGS})
@dataclasses.dataclass(frozen=True)
class DDIM(LinearSolver):
    """DDIM (Song et al. 2021, arXiv:2010.02502, equation 12): the predicted picture with the predicted noise again.

    `x' = sqrt(abar') x_0_hat + sqrt(1 - abar' - s^2) e_hat + s z`, where `abar'` is 1 after the last step and
    `s = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar'))`.

    steps:    kept of the objective's.
    eta:      share of the ancestral sampler's noise.
    spacing:  which steps are kept, see `spacing.kept_steps`; `leading` is diffusers'.
    """

    process: typing.ClassVar[str] = "ddpm"

    steps: int = 50
    eta: float = 0.0
    spacing: str = "leading"

    @property
    def draws(self) -> bool:
        return self.eta > 0

    def tables(self, objective: typing.Any) -> Tables:
        steps = kept_steps(self.spacing, self.steps, objective.steps)
        schedule = dataclasses.replace(objective.schedule, alpha_bars=objective.schedule.alpha_bars[steps])
        alpha_bars, following = schedule.alpha_bars, schedule.previous
        noise = self.eta * np.sqrt(schedule.posterior_variances)
        picture = np.sqrt(following / alpha_bars)  # x_0_hat is (x - sqrt(1 - abar) e_hat) / sqrt(abar)
        direction = np.sqrt(np.maximum(1 - following - noise**2, 0))
        rising = {
            "level": steps.astype(np.float64),
            "x": picture,
            "prediction": direction - picture * np.sqrt(1 - alpha_bars),
            "noise": noise,
        }
        return {name: table[::-1] for name, table in rising.items()}
