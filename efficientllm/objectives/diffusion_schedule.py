"""Noise schedule of a Gaussian diffusion: what follows from its alpha-bars, in float64 on the host."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Tables over the steps of a diffusion `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e` (Ho et al. 2020).

    alpha_bars:  `abar_t`, falling; 1 before the first step.

    Steps left out make another diffusion of the same marginals: `Schedule(alpha_bars[kept])` (Nichol & Dhariwal 2021,
    arXiv:2102.09672, Section 4).
    """

    alpha_bars: np.ndarray

    @classmethod
    def linear(cls, steps: int, first: float, last: float) -> "Schedule":
        """Betas from `first` to `last` in equal steps."""
        return cls(np.cumprod(1 - np.linspace(first, last, steps, dtype=np.float64)))

    @property
    def previous(self) -> np.ndarray:
        """Alpha-bars of the step before."""
        return np.append(1.0, self.alpha_bars[:-1])

    @property
    def alphas(self) -> np.ndarray:
        """`abar_t / abar_{t-1}`, which is `1 - beta_t`."""
        return self.alpha_bars / self.previous

    @property
    def betas(self) -> np.ndarray:
        """Variances of the forward process `q(x_t | x_{t-1})`."""
        return 1 - self.alphas

    @property
    def posterior_variances(self) -> np.ndarray:
        """Variances of `q(x_{t-1} | x_t, x_0)`; 0 at the first step."""
        return self.betas * (1 - self.previous) / (1 - self.alpha_bars)

    @property
    def log_posterior_variances(self) -> np.ndarray:
        """Their logarithms; the first step has that of the second, since its own is minus infinity."""
        variances = self.posterior_variances
        variances[0] = variances[1] if len(variances) > 1 else self.betas[0]
        return np.log(variances)

    @property
    def noise_to_mean(self) -> np.ndarray:
        """`beta_t / sqrt(alpha_t (1 - abar_t))`: the mean of `q(x_{t-1} | x_t, x_0)` falls by it times the noise.

        The mean is `x_t / sqrt(alpha_t) - noise_to_mean e`, where `e` is the noise that x_0 and x_t imply.
        """
        return self.betas / np.sqrt(self.alphas * (1 - self.alpha_bars))
