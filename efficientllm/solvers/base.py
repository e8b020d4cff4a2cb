"""Protocol of a solver: tables of float64 on the host, and a step of float32 in the compiled loop."""

import dataclasses
import typing

import jax
import numpy as np

from efficientllm.errors import FieldError
from efficientllm.typing import PyTree

Row = dict[str, jax.Array]  # the numbers of one step, float32
Tables = dict[str, np.ndarray]  # those of all steps, float64 `[steps]`


class Solver:
    """Base class of solvers.

    `tables` has a row a step: `level`, which the model is given, and whatever `step` takes. `step` may carry arrays
    from one step to the next, its memory; a multistep method keeps earlier predictions there.
    """

    # The `process` of the objectives whose models it samples from.
    process: typing.ClassVar[str] = ""

    @property
    def draws(self) -> bool:
        """Whether steps add noise."""
        return False

    def check(self, objective: typing.Any) -> None:
        """Raises UserError for an objective whose models this solver cannot sample from."""
        if objective.process != self.process:
            name, other = type(self).__name__.lower(), type(objective).__name__.lower()
            raise FieldError(
                "solver",
                f"{name} samples from models of the objective {self.process!r}, and this is {other!r}; give a "
                "solver of its own",
            )

    def tables(self, objective: typing.Any) -> Tables:
        """Computes the numbers of all steps."""
        raise NotImplementedError(f"{type(self).__name__} defines no tables(objective)")

    def memory(self, x_BhwC: jax.Array) -> PyTree:
        """Returns the memory before the first step."""
        return ()

    def step(
        self, row: Row, x_BhwC: jax.Array, prediction_Bhwc: jax.Array, memory: PyTree, noise_BhwC: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        """Computes `(the next x, memory)` from the model's prediction at x; `noise_BhwC` is None unless it `draws`."""
        raise NotImplementedError(f"{type(self).__name__} defines no step(row, x, prediction, memory, noise)")


@dataclasses.dataclass(frozen=True)
class LinearSolver(Solver):
    """A solver whose next x is a sum of x, the prediction and noise by the tables `x`, `prediction` and `noise`."""

    def step(
        self, row: Row, x_BhwC: jax.Array, prediction_Bhwc: jax.Array, memory: PyTree, noise_BhwC: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        prediction_BhwC = prediction_Bhwc[..., : x_BhwC.shape[-1]]  # what follows is the variance
        x_BhwC = row["x"] * x_BhwC + row["prediction"] * prediction_BhwC
        return x_BhwC if noise_BhwC is None else x_BhwC + row["noise"] * noise_BhwC, memory
