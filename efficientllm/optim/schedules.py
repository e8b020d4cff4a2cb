"""Learning-rate schedules with linear warm-up: cosine, linear and constant.

`warmup` is a share of the steps. `final` is a share of the peak rate.
"""

import optax

from efficientllm.registry import register


@register("schedule", "cosine")
def cosine(peak: float, steps: int, warmup: float = 0.0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `peak`, then half a cosine to `final * peak` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warmup_steps = _warmup_steps(warmup, steps)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, steps, final * peak)


@register("schedule", "linear")
def linear(peak: float, steps: int, warmup: float = 0.0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `peak`, then linear decay to `final * peak`."""
    warmup_steps = _warmup_steps(warmup, steps)
    decay = optax.linear_schedule(peak, final * peak, max(1, steps - warmup_steps))
    if not warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])


@register("schedule", "constant")
def constant(peak: float, steps: int, warmup: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `peak`, and no decay."""
    return linear(peak, steps, warmup, final=1.0)


def _warmup_steps(warmup, steps):
    """Number of warm-up steps. At least one step remains after them."""
    return min(round(warmup * steps), steps - 1)
