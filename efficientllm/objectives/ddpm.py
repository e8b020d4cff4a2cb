"""Denoising diffusion: the model predicts the noise, and a variance learned from the variational bound."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.errors import FieldError
from efficientllm.objectives.denoising import LEVELS, Denoising, Terms, mean_square, per_picture
from efficientllm.objectives.diffusion_schedule import Schedule
from efficientllm.registry import register

BIN = 2 / 255  # width of the discretized Gaussian's bins, for values in [-1, 1]
EDGE = 0.999  # values beyond it belong to the first or the last bin, which has no outer end
LEAST = 1e-12  # of probabilities, before the logarithm


@register("objective", "ddpm")
@dataclasses.dataclass(frozen=True)
class DDPM(Denoising):
    """Noise prediction (Ho et al. 2020, arXiv:2006.11239) with the hybrid loss of Nichol & Dhariwal 2021, as in DiT.

    The loss is the mean square error of the noise plus, if `vlb`, the term of the variational bound in bits per
    dimension, with weight 1 (arXiv:2102.09672, Section 3.1 has another). The bound's gradient reaches the variance
    alone. The picture is not clipped.

    steps:  of the diffusion; a level is the index of a step, from 0.
    beta:   variances of the first and the last step, linear between.
    vlb:    the model has a second half of channels, which interpolates the log variance between its bounds.
    """

    process: typing.ClassVar[str] = "ddpm"
    solver: typing.ClassVar[str] = "ddim"
    units: typing.ClassVar[dict[str, str]] = {**Denoising.units, "eval_vlb": "bit"}

    steps: int = 1000
    beta: tuple = (1e-4, 0.02)
    vlb: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", tuple(self.beta))
        if len(self.beta) != 2:
            raise FieldError(
                "objective",
                f"beta = {self.beta}: needs two variances, of the first and of the last step; the reference's are "
                "(1e-4, 0.02)",
            )

    @property
    def schedule(self) -> Schedule:
        """The tables of all steps."""
        return Schedule.linear(self.steps, *self.beta)

    def check(self, model: typing.Any) -> None:
        super().check(model)
        if self.vlb != model.learned_sigma:
            raise FieldError(
                "objective",
                f"vlb = {self.vlb}: {'needs' if self.vlb else 'trains no'} channels of the variance; set "
                f"vlb={model.learned_sigma}, or learned_sigma={self.vlb} in config.model.embed",
            )

    def draw_times(self, key: jax.Array, rows: int) -> jax.Array:
        """Draws indices of steps, int32."""
        return jax.random.randint(key, (rows,), 0, self.steps)

    def held_out_times(self) -> np.ndarray:
        return np.arange(1, LEVELS, dtype=np.int32) * self.steps // LEVELS

    def levels(self, times_B: jax.Array) -> jax.Array:
        return times_B.astype(jnp.float32)

    def add_noise(self, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        signal, noise = self._mixture(times_B, images_BhwC.ndim)
        return signal * images_BhwC + noise * noise_BhwC

    def _mixture(self, times_B, axes):
        """The shares of picture and noise at `times_B`."""
        alpha_bars = self.schedule.alpha_bars
        return at(np.sqrt(alpha_bars), times_B, axes), at(np.sqrt(1 - alpha_bars), times_B, axes)

    def training_losses(
        self, prediction_Bhwc: jax.Array, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array
    ) -> jax.Array:
        return sum(self.held_out_losses(prediction_Bhwc, images_BhwC, noise_BhwC, times_B).values())

    def held_out_losses(
        self, prediction_Bhwc: jax.Array, images_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array
    ) -> Terms:
        """Computes the mean square error of the noise and, beside it, the term of the bound in bits per dimension."""
        if not self.vlb:
            return {"eval_loss": mean_square(prediction_Bhwc - noise_BhwC)}
        noise_hat_BhwC, fraction_BhwC = jnp.split(prediction_Bhwc, 2, -1)
        errors_BhwC = noise_hat_BhwC - noise_BhwC
        bound_B = self.bound(jax.lax.stop_gradient(errors_BhwC), fraction_BhwC, images_BhwC, times_B)
        return {"eval_loss": mean_square(errors_BhwC), "eval_vlb": bound_B}

    def bound(
        self, errors_BhwC: jax.Array, fraction_BhwC: jax.Array, images_BhwC: jax.Array, times_B: jax.Array
    ) -> jax.Array:
        """Computes the term of the variational bound at each picture's time, in bits per dimension, `[B]`.

        It is the divergence of `q(x_{t-1} | x_t, x_0)` from the model's Gaussian, and at the first step the negative
        log likelihood of the picture. The two means differ by the error of the noise times `noise_to_mean`.
        """
        schedule, axes = self.schedule, images_BhwC.ndim
        difference_BhwC = at(schedule.noise_to_mean, times_B, axes) * errors_BhwC
        log_posterior_B = at(schedule.log_posterior_variances, times_B, axes)
        log_variance_BhwC = interpolated(fraction_BhwC, log_posterior_B, at(np.log(schedule.betas), times_B, axes))
        divergence_BhwC = 0.5 * (
            log_variance_BhwC
            - log_posterior_B
            - 1
            + jnp.exp(log_posterior_B - log_variance_BhwC)
            + jnp.square(difference_BhwC) * jnp.exp(-log_variance_BhwC)
        )
        decoded_BhwC = -discretized_log_likelihood(images_BhwC, difference_BhwC, 0.5 * log_variance_BhwC)
        nats_BhwC = jnp.where(per_picture(times_B, axes) == 0, decoded_BhwC, divergence_BhwC)
        return jnp.mean(nats_BhwC, tuple(range(1, axes))) / math.log(2)

    def to_image(self, x_BhwC: jax.Array, noise_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        """Computes the picture that `x_BhwC` and its noise imply."""
        signal, noise = self._mixture(times_B, x_BhwC.ndim)
        return (x_BhwC - noise * noise_BhwC) / signal

    def to_noise(self, x_BhwC: jax.Array, images_BhwC: jax.Array, times_B: jax.Array) -> jax.Array:
        """Computes the noise that `x_BhwC` and its picture imply."""
        signal, noise = self._mixture(times_B, x_BhwC.ndim)
        return (x_BhwC - signal * images_BhwC) / noise


def at(table: np.ndarray, times_B: jax.Array, axes: int) -> jax.Array:
    """Looks float32 values of a table up, one a picture of so many `axes` (`per_picture`)."""
    return per_picture(jnp.asarray(table, jnp.float32)[times_B], axes)


def interpolated(fraction: jax.Array, log_least: jax.Array, log_most: jax.Array) -> jax.Array:
    """Computes the learned log variance: -1 is the posterior's, 1 the forward process's."""
    share = (fraction + 1) / 2
    return share * log_most + (1 - share) * log_least


def discretized_log_likelihood(images: jax.Array, difference: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Computes the log likelihood (nats) of the bins of `images` under Gaussians of means `images - difference`.

    The normal distribution function is approximated by tanh, as in the reference.
    """
    upper = normal_cdf(jnp.exp(-log_scale) * (difference + BIN / 2))
    lower = normal_cdf(jnp.exp(-log_scale) * (difference - BIN / 2))
    inside = jnp.where(images > EDGE, 1 - lower, upper - lower)
    return jnp.log(jnp.maximum(jnp.where(images < -EDGE, upper, inside), LEAST))


def normal_cdf(x: jax.Array) -> jax.Array:
    """Approximates the distribution function of the standard normal."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
