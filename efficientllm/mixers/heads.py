"""What attentions of query and KV heads have in common."""

import flax.linen as nn
import jax

from efficientllm.errors import UserError
from efficientllm.layers import Linear, linears
from efficientllm.sharding import constrain


def project(
    x_BTD: jax.Array,
    heads: int,
    width: int,
    axis: str | None,
    precision: str,
    name: str,
    use_bias: bool = False,
    length: str | None = None,
) -> jax.Array:
    """A linear map to heads, `[B, T, heads, width]`; to be called where a module creates its own.

    `length` is the logical axis of the tokens: None where what follows needs a whole row.
    Heads that do not divide over `tensor` stay whole: split ones would be put together for every rotation.
    """
    return projections(x_BTD, {name: (heads, axis)}, width, precision, use_bias, length)[0]


def projections(
    x_BTD: jax.Array,
    parts: dict[str, tuple[int, str]],
    width: int,
    precision: str,
    use_bias: bool = False,
    length: str | None = None,
) -> list[jax.Array]:
    """`project` for each `name: (count of heads, axis)` of `parts`; in one call where their kernels have one."""
    layers = [
        Linear(count * width, ("embed", axis), precision, use_bias, name=name) for name, (count, axis) in parts.items()
    ]
    return [
        constrain(y_BTe.reshape(*x_BTD.shape[:2], -1, width), "batch", length, layer.axes[-1], None)
        for layer, y_BTe in zip(layers, linears(x_BTD, *layers), strict=True)
    ]


def check_groups(mixer: nn.Module) -> None:
    """Raises UserError unless each KV head of the mixer serves as many query heads as every other."""
    heads, kv_heads = mixer.num_heads, mixer.num_kv_heads
    if kv_heads < 1 or heads % kv_heads:
        name = type(mixer).__name__.lower()
        raise UserError(f"{name}: num_heads = {heads} is no multiple of num_kv_heads = {kv_heads}")
