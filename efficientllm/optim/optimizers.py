"""Optimizers: Adam, Lion and SGD as optax transformations.

Each returns the direction of descent only. `from_config.optimizer` adds clipping, weight decay and the learning rate.
"""

import optax

from efficientllm.registry import register


@register("optimizer", "adamw")
def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return optax.scale_by_adam(b1, b2, eps)


@register("optimizer", "lion")
def lion(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675)."""
    return optax.scale_by_lion(b1, b2)


@register("optimizer", "sgd")
def sgd(momentum: float = 0.9) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum."""
    return optax.trace(momentum)
