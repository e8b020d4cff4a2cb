"""Which of the steps of a diffusion a sampler keeps."""

import itertools

import numpy as np

from efficientllm.errors import FieldError

SPACINGS = ("even", "leading", "stride")


def kept_steps(spacing: str, steps: int, total: int) -> np.ndarray:
    """Returns the indices of `steps` of `total` steps, rising from 0.

    spacing:
      even:     from the first to the last, rounded (half to even): `"250"` in guided-diffusion.
      leading:  multiples of `total // steps`, as diffusers has by default. They end early: at 996 for 250 of 1000.
      stride:   all multiples of the smallest whole number that gives so many: `"ddim250"` in guided-diffusion.

    Raises UserError for more steps than there are, and for a number of steps that no stride gives.
    """
    if steps > total:
        raise FieldError("solver", f"steps = {steps}: the objective has {total}; give the solver no more than those")
    if spacing == "leading":
        return np.arange(steps) * (total // steps)
    if spacing == "stride":
        return _stride(steps, total)
    # The sum of strides, not a product, as in the reference: both may round to another side of a half.
    sums = itertools.accumulate([(total - 1) / max(1, steps - 1)] * (steps - 1), initial=0.0)
    return np.array([round(position) for position in sums])


def _stride(steps, total):
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == steps:
            return np.arange(0, total, stride)
    raise FieldError(
        "solver", f"steps = {steps}: no stride keeps so many of {total} steps; give a divisor, or spacing='leading'"
    )
