"""Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, Eq. 5 and Section 4.3)."""

import dataclasses
import math
import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.adapters.base import box
from efficientllm.adapters.lora import STATIC, LoRA, LoRAMethod, dropped
from efficientllm.registry import register
from efficientllm.weights import Weight, dense, matmul


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

    @property
    def _direction(self):
        return LoRA(self.base, self.a, self.b, self.key, self.scale, self.dropout)

    def _gain(self):
        """`m / |V|`, `[..., out]`."""
        norm = jnp.linalg.norm(jax.lax.stop_gradient(self._direction.dense()), axis=-2)
        return self.m / norm

    def matmul(self, x, precision, out_dtype):
        out_dtype = out_dtype or x.dtype
        product = lambda x, w: matmul(x, w, precision, out_dtype)  # noqa: E731
        gain = self._gain().astype(out_dtype)
        if self.key is None:
            return self._direction.apply(x, product) * gain
        # What is dropped is the change's input; the frozen kernel sees all of x (as peft).
        low = dropped(x, self.key, self.dropout)
        changed = gain * (product(low, self.base) + self.scale * product(product(low, self.a).astype(x.dtype), self.b))
        return product(x, self.base) + changed - product(low, self.base)

    def dense(self):
        return self._direction.dense() * self._gain()[..., None, :]


@register("adapter", "dora")
@dataclasses.dataclass(frozen=True)
class DoRAMethod(LoRAMethod):
    """LoRA of the direction and a magnitude of its own for each output."""

    learnt = ("a", "b", "m")

    def wrap(self, held, names, key):
        lora = super().wrap(held, names, key)
        norm = jnp.linalg.norm(dense(nn.unbox(held)).astype(jnp.float32), axis=-2)
        m = box(norm, (*names[:-2], names[-1]))
        return DoRA(lora.base, lora.a, lora.b, m, scale=self.scale, dropout=self.dropout)

    def step_flops(self, shape, rows):
        """LoRA's, and the product A B, of which the norm is taken once a step."""
        return super().step_flops(shape, rows) + 2 * math.prod(shape) * self.rank
