"""Signum (Bernstein et al. 2018, arXiv:1802.04434), and a schedule that is flat until its end (arXiv:2404.06395)."""

import optax

from efficientllm.registry import register


@register("optimizer", "signum")
def signum(momentum: float = 0.9):
    """The sign of a running mean. Weight decay, rates and the learning rate come after it."""
    return optax.chain(optax.ema(momentum), optax.scale_by_sign())


@register("schedule", "wsd")
def wsd(peak: float, steps: int, warmup: float = 0.1, decay: float = 0.2):
    """Warm-up, stable, decay: shares of the steps, of which `steps` are given."""
    rise, fall = max(1, round(warmup * steps)), max(1, round(decay * steps))
    phases = [
        optax.linear_schedule(0.0, peak, rise),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, fall),
    ]
    return optax.join_schedules(phases, [rise, steps - fall])
