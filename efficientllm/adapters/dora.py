"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, Eq. 5 and Section 4.3)."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.adapters.base import PeftFormat
from efficientllm.adapters.lora import STATIC, LoRA, LoRAMethod, dropped
from efficientllm.registry import register
from efficientllm.typing import PyTree
from efficientllm.weights import Axes, Weight, box, can_shard_inputs, dense


@flax.struct.dataclass
class DoRA(Weight):
    """DoRA kernel `m V / |V|` with `V = W + scale A B` (Eq. 5).

    |V| is the norm of each output's column, `m` `[..., out]` its magnitude. The other fields are those of `LoRA`. The
    gradient takes the norm as a constant (Section 4.3).
    """

    base: PyTree
    a: jax.Array
    b: jax.Array
    m: jax.Array
    key: jax.Array | None = None
    scale: float = flax.struct.field(default=1.0, **STATIC)
    dropout: float = flax.struct.field(default=0.0, **STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def _scaled(self):
        direction = LoRA(self.base, self.a, self.b, self.key, self.scale, self.dropout)
        norm = jnp.linalg.norm(jax.lax.stop_gradient(direction.dense()), axis=-2)
        return ScaledWeight(direction, self.m / norm)

    def apply(self, x: jax.Array, product: Callable[..., jax.Array], of_rows: Callable[..., jax.Array]) -> jax.Array:
        return self._scaled().apply(x, product, of_rows)

    def can_shard_inputs(self, shards: int) -> bool:
        return can_shard_inputs(self.base, shards)

    def as_input_sharded(self, shards: int) -> "ScaledWeight":
        """Compute each output's gain first: the norm of a shard of a column is not the norm of the column."""
        scaled = self._scaled()
        return scaled.replace(direction=scaled.direction.as_input_sharded(shards))

    def dense(self) -> jax.Array:
        return self._scaled().dense()


@flax.struct.dataclass
class ScaledWeight(Weight):
    """LoRA kernel whose outputs are multiplied by `gain` `[..., out]`."""

    direction: LoRA
    gain: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    def apply(self, x: jax.Array, product: Callable[..., jax.Array], of_rows: Callable[..., jax.Array]) -> jax.Array:
        lora = self.direction
        if lora.key is None:
            y = lora.apply(x, product, of_rows)
            return y * of_rows(self.gain).astype(y.dtype)
        # Dropout applies to the adapter's input; the frozen kernel reads all of x (as in peft). With x' the dropped
        # input: y = x W + (gain - 1) x' W + gain scale x' A B.
        dropped_x = dropped(x, lora.key, lora.dropout)
        dropped_y = product(dropped_x, lora.base)
        gain = of_rows(self.gain).astype(dropped_y.dtype)
        change = lora.scale * product(product(dropped_x, lora.a).astype(x.dtype), lora.b)
        return product(x, lora.base) - dropped_y + gain * (dropped_y + change)

    def axes(self, names: Sequence[str | None]) -> "ScaledWeight":
        return ScaledWeight(self.direction.axes(names), Axes((*names[:-2], names[-1])))

    def dense(self) -> jax.Array:
        return self.direction.dense() * self.gain[..., None, :]


@register("adapter", "dora")
@dataclasses.dataclass(frozen=True)
class DoRAMethod(LoRAMethod):
    """DoRA: LoRA of the kernel's direction, and a trainable magnitude for each output."""

    learnt = ("a", "b", "m")
    leaf_type = DoRA
    peft = PeftFormat("LORA", {"use_dora": True}, experts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> DoRA:
        lora = super().wrap(kernel, names, key)
        norm = jnp.linalg.norm(dense(nn.unbox(kernel)).astype(jnp.float32), axis=-2)
        m = box(norm, (*names[:-2], names[-1]))
        return DoRA(lora.base, lora.a, lora.b, m, scale=self.scale, dropout=self.dropout)

    def step_flops(self, shape: Sequence[int], rows: int) -> float:
        """Count LoRA's FLOPs and those of A B, whose norm is taken once a step.

        With dropout, the kernel also multiplies the dropped inputs, forward and in the gradient of its input.
        """
        dropout_flops = 4 * rows * math.prod(shape) if self.dropout else 0
        return super().step_flops(shape, rows) + 2 * math.prod(shape) * self.rank + dropout_flops
