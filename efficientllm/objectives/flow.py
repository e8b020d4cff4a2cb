"""Rectified flow: the model predicts the velocity from the picture to the noise."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError
from efficientllm.objectives.denoising import LEVELS, Denoising, Terms, mean_square, per_picture
from efficientllm.registry import register

WEIGHTS = ("one", "sigma2")
DENSITIES = ("logit_normal", "uniform")
TIME_SCALE = 1000.0  # the level of a model is 1000 sigma
Sigma = typing.TypeVar("Sigma", jax.Array, np.ndarray)


def shifted(sigma: Sigma, shift: float) -> Sigma:
    """Moves noise levels towards noise, `s u / (1 + (s - 1) u)` (Esser et al. 2024, arXiv:2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@register("objective", "flow", choices={"weight": WEIGHTS, "density": DENSITIES})
@dataclasses.dataclass(frozen=True)
class Flow(Denoising):
    """Rectified flow, `x = (1 - sigma) x_0 + sigma e` and `v = e - x_0`: `|v_hat - v|^2` (arXiv:2403.03206).

    shift:    resolution shift of sigma, 3 for 1024 pixels.
    density:  of sigma before the shift: `logit_normal`, the sigmoid of a normal of `mean` and `std`, or `uniform`.
    weight:   `one`, or `sigma2`, which makes the loss the error of the predicted picture. diffusers' training script
              for SD3 has the latter by default; the paper has not.
    """

    process: typing.ClassVar[str] = "flow"
    solver: typing.ClassVar[str] = "euler"

    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    weight: str = "one"
    density: str = "logit_normal"

    def check(self, model: typing.Any) -> None:
        super().check(model)
        if model.learned_sigma:
            raise FieldError(
                "objective",
                "predicts no variance, and the model has channels for one; set learned_sigma=False in "
                "config.model.embed",
            )

    def draw_times(self, key: jax.Array, rows: int) -> jax.Array:
        """Draws sigma in (0, 1)."""
        if self.density == "uniform":
            return shifted(jax.random.uniform(key, (rows,)), self.shift)
        return shifted(jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (rows,))), self.shift)

    def held_out_times(self) -> np.ndarray:
        """Returns sigma = 1/8..7/8, whatever the shift."""
        return np.arange(1, LEVELS, dtype=np.float32) / LEVELS

    def levels(self, times_B: jax.Array) -> jax.Array:
        return TIME_SCALE * times_B

    def add_noise(self, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        sigma_B = per_picture(times_B, images_BhwC.ndim)
        return (1 - sigma_B) * images_BhwC + sigma_B * noise_BhwC

    def training_losses(
        self, prediction_Bhwc: jax.Array, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array
    ) -> jax.Array:
        errors_B = mean_square(prediction_Bhwc - (noise_BhwC - images_BhwC))
        return errors_B * jnp.square(times_B) if self.weight == "sigma2" else errors_B

    def held_out_losses(
        self, prediction_Bhwc: jax.Array, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array
    ) -> Terms:
        """Computes `|v_hat - v|^2`, whatever the weight of the training loss."""
        return {"eval_loss": mean_square(prediction_Bhwc - (noise_BhwC - images_BhwC))}

    def to_image(self, x_BhwC: jax.Array, velocity_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        """Computes the picture that a velocity at `x_BhwC` implies."""
        return x_BhwC - per_picture(times_B, x_BhwC.ndim) * velocity_BhwC

    def to_noise(self, x_BhwC: jax.Array, velocity_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        """Computes the noise that a velocity at `x_BhwC` implies."""
        return x_BhwC + (1 - per_picture(times_B, x_BhwC.ndim)) * velocity_BhwC
