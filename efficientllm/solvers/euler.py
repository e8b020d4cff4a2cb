"""Euler steps along the velocity of a rectified flow, and lists of noise levels."""

import dataclasses
import itertools
import typing

import numpy as np

from efficientllm.errors import FieldError
from efficientllm.objectives.flow import TIME_SCALE, shifted
from efficientllm.registry import register
from efficientllm.solvers.base import LinearSolver, Tables

LEVELS = ("even", "sd3")
TRAINED = 1000  # noise levels of the training table that `sd3` starts from


@register("solver", "euler", choices={"levels": LEVELS})
@dataclasses.dataclass(frozen=True)
class Euler(LinearSolver):
    """Euler's method, `x += (sigma' - sigma) v`, from sigma 1 to 0.

    steps:   from noise to a picture.
    shift:   of sigma, as in the objective, which it is taken from by default.
    levels:  of sigma: `even` before the shift, or `sd3`, see `flow_sigmas`.
    sigmas:  falling values, without the 0 at the end, instead of all that.
    """

    process: typing.ClassVar[str] = "flow"

    steps: int = 28
    shift: float = None
    levels: str = "even"
    sigmas: tuple = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(self.sigmas))
        if not all(sigma > following for sigma, following in itertools.pairwise((*self.sigmas, 0))):
            raise FieldError("solver", f"sigmas = {self.sigmas}: must fall, and end above 0, which is appended")

    def tables(self, objective: typing.Any) -> Tables:
        shift = objective.shift if self.shift is None else self.shift
        sigmas = np.append(self.sigmas, 0.0) if self.sigmas else flow_sigmas(self.steps, shift, self.levels)
        return {
            "level": TIME_SCALE * sigmas[:-1],
            "x": np.ones(len(sigmas) - 1),
            "prediction": np.diff(sigmas),
        }


def flow_sigmas(steps: int, shift: float = 1.0, levels: str = "even") -> np.ndarray:
    """Returns `steps` falling noise levels from 1, and 0 after them, float64.

    even:  equal steps from 1 to 0, then shifted.
    sd3:   equal steps between the largest and the smallest shifted level of a training table of 1000, then shifted
           again, as diffusers and Stable Diffusion 3 sample: 28 steps of shift 3 end at 0.1109, 0.0089, 0.
    """
    if levels == "sd3":
        sigmas = shifted(np.linspace(1.0, shifted(np.float64(1 / TRAINED), shift), steps), shift)
    else:
        sigmas = shifted(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return np.append(sigmas, 0.0)
