"""Ancestral sampling of a denoising diffusion, with steps left out and with learned variances."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError
from efficientllm.objectives.ddpm import interpolated
from efficientllm.registry import register
from efficientllm.solvers.base import Row, Solver, Tables
from efficientllm.solvers.spacing import SPACINGS, kept_steps
from efficientllm.typing import PyTree

VARIANCES = ("learned", "posterior", "beta")


@register("solver", "ddpm", choices={"spacing": SPACINGS, "variance": VARIANCES})
@dataclasses.dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2): the posterior's mean and noise of its variance.

    The kept steps make a diffusion of their own, with betas rebuilt from their alpha-bars; the model is given the
    original indices. The predicted picture is not clipped.

    steps:     kept of the objective's.
    spacing:   which steps are kept, see `spacing.kept_steps`.
    variance:  `learned`: the model's, between the two others; `posterior`: of q(x_{t-1} | x_t, x_0); `beta`: of the
               forward process.
    """

    process: typing.ClassVar[str] = "ddpm"

    steps: int = 250
    spacing: str = "even"
    variance: str = "learned"

    @property
    def draws(self) -> bool:
        return True

    def check(self, objective: typing.Any) -> None:
        super().check(objective)
        if self.variance == "learned" and not objective.vlb:
            raise FieldError(
                "solver",
                "variance = 'learned': needs the objective 'ddpm(vlb=True)'; give variance='posterior' or 'beta'",
            )

    def tables(self, objective: typing.Any) -> Tables:
        steps = kept_steps(self.spacing, self.steps, objective.steps)
        schedule = dataclasses.replace(objective.schedule, alpha_bars=objective.schedule.alpha_bars[steps])
        log_betas, log_posterior = np.log(schedule.betas), schedule.log_posterior_variances
        rising = {
            "level": steps.astype(np.float64),
            "x": 1 / np.sqrt(schedule.alphas),
            "prediction": -schedule.noise_to_mean,
            "noise": (np.arange(len(steps)) > 0).astype(np.float64),  # the first step of the diffusion adds none
            "log_most": log_posterior if self.variance == "posterior" else log_betas,
            "log_least": log_betas if self.variance == "beta" else log_posterior,
        }
        return {name: table[::-1] for name, table in rising.items()}

    def step(
        self, row: Row, x_BhwC: jax.Array, prediction_Bhwc: jax.Array, memory: PyTree, noise_BhwC: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        C = x_BhwC.shape[-1]
        mean_BhwC = row["x"] * x_BhwC + row["prediction"] * prediction_Bhwc[..., :C]
        fraction = prediction_Bhwc[..., C:] if self.variance == "learned" else 1.0
        log_variance = interpolated(fraction, row["log_least"], row["log_most"])
        return mean_BhwC + row["noise"] * jnp.exp(0.5 * log_variance) * noise_BhwC, memory
