"""Learning-rate schedules by spec. Warm-up is a share of the steps, `final` a share of the peak."""

import optax

from efficientllm.registry import register


@register("schedule", "cosine")
def cosine(peak: float, steps: int, warmup: float = 0.0, final: float = 0.0):
    """Linear warm-up to `peak`, then a half cosine to `final * peak` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    rise = _rise(warmup, steps)
    return optax.warmup_cosine_decay_schedule(0.0 if rise else peak, peak, rise, steps, final * peak)


@register("schedule", "linear")
def linear(peak: float, steps: int, warmup: float = 0.0, final: float = 0.0):
    """Linear warm-up to `peak`, then a straight line to `final * peak`."""
    rise = _rise(warmup, steps)
    fall = optax.linear_schedule(peak, final * peak, max(1, steps - rise))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, rise)), fall], [rise]) if rise else fall


@register("schedule", "constant")
def constant(peak: float, steps: int, warmup: float = 0.0):
    """Linear warm-up to `peak`, and no decay."""
    return linear(peak, steps, warmup, final=1.0)


def _rise(warmup, steps):
    """Steps of the warm-up, after which there is at least one."""
    return min(round(warmup * steps), steps - 1)
