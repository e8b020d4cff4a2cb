"""Projections to query and KV heads."""

import flax.linen as nn
import jax

from efficientllm.errors import UserError
from efficientllm.layers import Linear, linears
from efficientllm.registry import build
from efficientllm.sharding import constrain

QK_NORMS = ("", "head", "all")  # which numbers of queries and keys are normalized together


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
    """Projects to heads, `[B, T, heads, width]`; call it inside the compact method of a module.

    `length` is the logical axis of the tokens; None where the caller needs whole rows. Heads whose count the mesh axis
    `tensor` does not divide are replicated: a head sharded over its width would be all-gathered for every rotation.
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
    """Applies `project` to each `name: (heads, axis)` of `parts`, in one product where their kernels allow it."""
    layers = [
        Linear(count * width, ("embed", axis), precision, use_bias, name=name) for name, (count, axis) in parts.items()
    ]
    # e: the heads of a token side by side, heads x width
    return [
        constrain(y_BTe.reshape(*x_BTD.shape[:2], -1, width), "batch", length, layer.axes[-1], None)
        for layer, y_BTe in zip(layers, linears(x_BTD, *layers), strict=True)
    ]


def qk_norm_kind(mixer: nn.Module) -> str:
    """Returns the mixer's `qk_norm`, one of `QK_NORMS`; True is `head`, False none. Raises UserError for another."""
    kind = {True: "head", False: ""}.get(mixer.qk_norm, mixer.qk_norm)
    if kind not in QK_NORMS:
        raise UserError(
            f"{type(mixer).__name__.lower()}: qk_norm = {mixer.qk_norm!r} is none of {', '.join(map(repr, QK_NORMS))}"
        )
    return kind


def normalize(x_BTHK: jax.Array, kind: str | bool, norm: str, name: str, axis: str) -> jax.Array:
    """Applies a norm to each head of queries or keys, or to all heads of a token together; see `project`.

    Args:
      kind: one of `QK_NORMS`.
      axis: the logical axis of the heads.
    """
    if not kind:
        return x_BTHK
    if kind == "head":
        return build("norm", norm, name=name, axis=None)(x_BTHK)
    return build("norm", norm, name=name, axis=axis)(x_BTHK.reshape(*x_BTHK.shape[:2], -1)).reshape(x_BTHK.shape)


def check_groups(mixer: nn.Module) -> None:
    """Raises UserError unless the mixer's `num_heads` is a multiple of its `num_kv_heads`."""
    heads, kv_heads = mixer.num_heads, mixer.num_kv_heads
    if kv_heads < 1 or heads % kv_heads:
        name = type(mixer).__name__.lower()
        raise UserError(f"{name}: num_heads = {heads} is no multiple of num_kv_heads = {kv_heads}")
