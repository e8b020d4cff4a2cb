"""UniPC: a predictor and corrector of second order that calls the model once a step."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.objectives.flow import TIME_SCALE, shifted
from efficientllm.registry import register
from efficientllm.solvers.base import Row, Solver, Tables
from efficientllm.typing import PyTree

LEAST = 1e-6  # below sigma 1, where the log ratio of picture to noise is minus infinity


@register("solver", "unipc")
@dataclasses.dataclass(frozen=True)
class UniPC(Solver):
    """UniPC of order 2 for rectified flows (Zhao et al. 2023, arXiv:2302.04867), with B(h) = expm1(-h), as Wan has it.

    It predicts the picture. A step corrects x by the prediction at it, then goes on; the first and the last step are
    of order 1. The memory is the corrected x of the step before and the pictures predicted one and two steps before.

    steps:           from noise to a picture.
    shift:           of sigma, as in the objective, which it is taken from by default.
    integer_levels:  the model is given 1000 sigma truncated, as in Wan's training.
    """

    process: typing.ClassVar[str] = "flow"

    steps: int = 50
    shift: float = None
    integer_levels: bool = True

    def tables(self, objective: typing.Any) -> Tables:
        """The weights of all sums: of the corrected x (`corrected_...`), then of the next one (`next_...`)."""
        shift = objective.shift if self.shift is None else self.shift
        sigmas: np.ndarray = np.append(shifted(np.linspace(1.0, 1 / TIME_SCALE, self.steps + 1)[:-1], shift), 0.0)
        sigmas[0] -= LEAST
        levels = TIME_SCALE * sigmas[:-1]
        rows = [_corrector(sigmas, k) | _predictor(sigmas, k) for k in range(self.steps)]
        return {
            "level": np.trunc(levels) if self.integer_levels else levels,
            "sigma": sigmas[:-1],
            **{name: np.array([row[name] for row in rows]) for name in rows[0]},
        }

    def memory(self, x_BhwC: jax.Array) -> PyTree:
        return {name: jnp.zeros_like(x_BhwC) for name in ("x", "image", "image_before")}

    def step(
        self, row: Row, x_BhwC: jax.Array, prediction_Bhwc: jax.Array, memory: PyTree, noise_BhwC: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        image = x_BhwC - row["sigma"] * prediction_Bhwc
        corrected = (
            row["corrected_own"] * x_BhwC
            + row["corrected_x"] * memory["x"]
            + row["corrected_image"] * memory["image"]
            + row["corrected_before"] * memory["image_before"]
            + row["corrected_new"] * image
        )
        following = row["next_x"] * corrected + row["next_new"] * image + row["next_image"] * memory["image"]
        return following, {"x": corrected, "image": image, "image_before": memory["image"]}


def _order(steps, k):
    """The order of the predictor of step k."""
    return min(2, steps - k, k + 1)


def _log_ratio(sigma):
    return np.log((1 - sigma) / sigma)


def _corrector(sigmas, k):
    """The weights of the sum that corrects x at `sigmas[k]`, with the order of the predictor that gave it."""
    if k == 0:
        return {f"corrected_{name}": float(name == "own") for name in ("own", "x", "image", "before", "new")}
    h = _log_ratio(sigmas[k]) - _log_ratio(sigmas[k - 1])
    E = np.expm1(-h)
    before, new = 0.0, 0.5
    if _order(len(sigmas) - 1, k - 1) == 2:
        r = (_log_ratio(sigmas[k - 2]) - _log_ratio(sigmas[k - 1])) / h
        q = E / -h - 1
        before, new = np.linalg.solve([[1, 1], [r, 1]], [q / E, 2 * (q / -h - 0.5) / E])
        before /= r
    scale = -(1 - sigmas[k]) * E
    return {
        "corrected_own": 0.0,
        "corrected_x": sigmas[k] / sigmas[k - 1],
        "corrected_image": scale * (1 - before - new),
        "corrected_before": scale * before,
        "corrected_new": scale * new,
    }


def _predictor(sigmas, k):
    """The weights of the sum that goes from `sigmas[k]` to the next; at sigma 0 it is the predicted picture."""
    sigma, following = sigmas[k], sigmas[k + 1]
    if following == 0:
        return {"next_x": 0.0, "next_new": 1.0, "next_image": 0.0}
    h = _log_ratio(following) - _log_ratio(sigma)
    scale = -(1 - following) * np.expm1(-h)
    before = 0.5 * h / (_log_ratio(sigmas[k - 1]) - _log_ratio(sigma)) if _order(len(sigmas) - 1, k) == 2 else 0.0
    return {"next_x": following / sigma, "next_new": scale * (1 - before), "next_image": scale * before}
