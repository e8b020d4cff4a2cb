"""Adapters that materialise a full weight delta: LoHa, LoKr and GLoRA.

LoHa: Hyeon-Woo et al. 2022, arXiv:2108.06098, Eq. 3. LoKr: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, Section 3.
GLoRA: Chavan et al. 2023, arXiv:2306.07967, Eq. 10. Initial values are peft's, or the paper's for GLoRA.
"""

import dataclasses
import math
import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.adapters.base import Method, PeftFormat
from efficientllm.adapters.lora import STATIC
from efficientllm.registry import register
from efficientllm.weights import Weight, box, dense


class _FullDelta(Weight):
    """A kernel and a delta of its shape, `delta()`, that is added to it."""

    @property
    def shape(self):
        return self.base.shape

    def dense(self):
        return dense(self.base) + self.delta()


@flax.struct.dataclass
class LoHa(_FullDelta):
    """`W + scale (A1 B1) * (A2 B2)`, an elementwise product of two low-rank ones: `a*` `[..., in, R]`, `b*`
    `[..., R, out]`."""

    base: typing.Any
    a1: typing.Any
    b1: typing.Any
    a2: typing.Any
    b2: typing.Any
    scale: float = flax.struct.field(default=1.0, **STATIC)

    def delta(self):
        return self.scale * _product(self.a1, self.b1) * _product(self.a2, self.b2)


@flax.struct.dataclass
class LoKr(_FullDelta):
    """`W + scale C kron (A B)`: `c` `[..., in1, out1]`, `a` `[..., in2, R]`, `b` `[..., R, out2]`."""

    base: typing.Any
    c: typing.Any
    a: typing.Any
    b: typing.Any
    scale: float = flax.struct.field(default=1.0, **STATIC)

    def delta(self):
        block = _product(self.a, self.b)
        blocks = jnp.einsum("...io,...jp->...ijop", self.c, block)
        return self.scale * blocks.reshape(self.shape)


@flax.struct.dataclass
class GLoRA(_FullDelta):
    """`W + W * (A1 B1) + A2 B2`: the kernel scaled elementwise and shifted.

    The paper's other three terms change a bias (C W, D b, E); a kernel has none.
    """

    base: typing.Any
    a1: typing.Any
    b1: typing.Any
    a2: typing.Any
    b2: typing.Any

    def delta(self):
        return dense(self.base) * _product(self.a1, self.b1) + _product(self.a2, self.b2)


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")


@dataclasses.dataclass(frozen=True)
class _LowRank(Method):
    rank: int = 8
    target: str = ".*"

    def step_flops(self, shape, rows):
        """The kernel's gradient, and the products that make the change, with their gradients."""
        return 2 * rows * math.prod(shape) + self._delta_flops(shape)

    def _delta_flops(self, shape):
        return 2 * 6 * math.prod(shape) * self.rank

    def _pairs(self, kernel, names, key, deviations):
        """`(a1, b1, a2, b2)` boxed, normal with the given standard deviations."""
        *stack, width_in, width_out = nn.unbox(kernel).shape
        shapes = ((*stack, width_in, self.rank), (*stack, self.rank, width_out)) * 2
        *outer, axis_in, axis_out = names
        axes = ((*outer, axis_in, None), (*outer, None, axis_out)) * 2
        keys = jax.random.split(key, 4)
        arrays = zip(keys, shapes, deviations, axes, strict=True)
        return [box(deviation * jax.random.normal(subkey, shape), axis) for subkey, shape, deviation, axis in arrays]


@register("adapter", "loha")
@dataclasses.dataclass(frozen=True)
class LoHaMethod(_LowRank):
    """Adapters of a rank up to rank**2, scaled by alpha / rank."""

    alpha: float = 8.0

    learnt = ("a1", "b1", "a2", "b2")
    leaf_type = LoHa
    peft = PeftFormat("LOHA", experts=False)

    def wrap(self, kernel, names, key):
        return LoHa(kernel, *self._pairs(kernel, names, key, (1.0, 0.1, 1.0, 0.0)), scale=self.alpha / self.rank)


@register("adapter", "glora")
@dataclasses.dataclass(frozen=True)
class GLoRAMethod(_LowRank):
    """A low-rank scale and a low-rank shift of the kernel; neither does anything at first."""

    learnt = ("a1", "b1", "a2", "b2")
    leaf_type = GLoRA
    peft = PeftFormat("GLORA", experts=False)

    def wrap(self, kernel, names, key):
        deviation = 1 / math.sqrt(nn.unbox(kernel).shape[-2])
        return GLoRA(kernel, *self._pairs(kernel, names, key, (deviation, 0.0, deviation, 0.0)))


@register("adapter", "lokr")
@dataclasses.dataclass(frozen=True)
class LoKrMethod(_LowRank):
    """A Kronecker product of a small dense matrix, zero at first, and a low-rank one, scaled by alpha / rank."""

    alpha: float = 8.0

    learnt = ("c", "a", "b")
    leaf_type = LoKr
    peft = PeftFormat("LOKR", experts=False, parts=False)

    def wrap(self, kernel, names, key):
        *stack, width_in, width_out = nn.unbox(kernel).shape
        (in1, in2), (out1, out2) = _factors(width_in), _factors(width_out)
        shapes = {"c": (*stack, in1, out1), "a": (*stack, in2, self.rank), "b": (*stack, self.rank, out2)}
        keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
        # kaiming_uniform(a=sqrt(5)) of the factors as peft holds them, [out, in]; the small one is zero.
        bounds = {"c": 0.0, "a": 1 / math.sqrt(in2), "b": 1 / math.sqrt(self.rank)}
        outer = (*names[:-2], None, None)
        leaves = {
            name: box(jax.random.uniform(keys[name], shape, jnp.float32, -bounds[name], bounds[name]), outer)
            for name, shape in shapes.items()
        }
        return LoKr(kernel, **leaves, scale=self.alpha / self.rank)

    def _delta_flops(self, shape):
        *stack, width_in, width_out = shape
        (_, in2), (_, out2) = _factors(width_in), _factors(width_out)
        low_rank, kron = 6 * in2 * self.rank * out2, 6 * width_in * width_out
        return math.prod(stack) * (low_rank + kron)


def _factors(width):
    """The two factors of `width` that are nearest to each other, the smaller first (peft's `decompose_factor=-1`)."""
    small = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return small, width // small
