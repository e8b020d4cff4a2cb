"""Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, Eq. 5 and Section 4.3)."""

import dataclasses
import math
import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.adapters.base import PeftFormat
from efficientllm.adapters.lora import STATIC, LoRA, LoRAMethod, dropped
from efficientllm.registry import register
from efficientllm.weights import Axes, Weight, box, can_shard_inputs, dense


@flax.struct.dataclass
class DoRA(Weight):
    """`m V / |V|` with `V = W + scale A B`, |V| the norm of each output's column, `m` `[..., out]` its magnitude.

    The norm is no function of A and B to the gradient (Section 4.3).
    """

    base: typing.Any
    a: typing.Any
    b: typing.Any
    m: typing.Any
    key: typing.Any = None
    scale: float = flax.struct.field(default=1.0, **STATIC)
    dropout: float = flax.struct.field(default=0.0, **STATIC)

    @property
    def shape(self):
        return self.base.shape

    def _scaled(self):
        direction = LoRA(self.base, self.a, self.b, self.key, self.scale, self.dropout)
        norm = jnp.linalg.norm(jax.lax.stop_gradient(direction.dense()), axis=-2)
        return Scaled(direction, self.m / norm)

    def apply(self, x, product, of_rows):
        return self._scaled().apply(x, product, of_rows)

    def can_shard_inputs(self, shards):
        return can_shard_inputs(self.base, shards)

    def as_input_sharded(self, shards):
        """With each output's factor known: the norm of a part of a column is not that of the column."""
        scaled = self._scaled()
        return scaled.replace(direction=scaled.direction.as_input_sharded(shards))

    def dense(self):
        return self._scaled().dense()


@flax.struct.dataclass
class Scaled(Weight):
    """`direction` with its outputs times `gain` `[..., out]`."""

    direction: LoRA
    gain: typing.Any

    @property
    def shape(self):
        return self.direction.shape

    def apply(self, x, product, of_rows):
        lora = self.direction
        if lora.key is None:
            y = lora.apply(x, product, of_rows)
            return y * of_rows(self.gain).astype(y.dtype)
        # What is dropped is the change's input; the frozen kernel sees all of x (as peft).
        low = dropped(x, lora.key, lora.dropout)
        kept = product(low, lora.base)
        gain = of_rows(self.gain).astype(kept.dtype)
        change = lora.scale * product(product(low, lora.a).astype(x.dtype), lora.b)
        return product(x, lora.base) - kept + gain * (kept + change)

    def axes(self, names):
        return Scaled(self.direction.axes(names), Axes((*names[:-2], names[-1])))

    def dense(self):
        return self.direction.dense() * self.gain[..., None, :]


@register("adapter", "dora")
@dataclasses.dataclass(frozen=True)
class DoRAMethod(LoRAMethod):
    """LoRA of the direction and a magnitude of its own for each output."""

    learnt = ("a", "b", "m")
    leaf_type = DoRA
    peft = PeftFormat("LORA", {"use_dora": True}, experts=False)

    def wrap(self, held, names, key):
        lora = super().wrap(held, names, key)
        norm = jnp.linalg.norm(dense(nn.unbox(held)).astype(jnp.float32), axis=-2)
        m = box(norm, (*names[:-2], names[-1]))
        return DoRA(lora.base, lora.a, lora.b, m, scale=self.scale, dropout=self.dropout)

    def step_flops(self, shape, rows):
        """LoRA's, and the product A B, of which the norm is taken once a step; and where inputs are dropped, the
        kernel's own product of them with the gradient of its input."""
        kept = 4 * rows * math.prod(shape) if self.dropout else 0
        return super().step_flops(shape, rows) + 2 * math.prod(shape) * self.rank + kept
