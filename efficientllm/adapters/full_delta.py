"""LoHa, LoKr and GLoRA: adapters that materialize a weight delta of the kernel's shape.

LoHa: Hyeon-Woo et al. 2022, arXiv:2108.06098, Eq. 3. LoKr: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, Section 3.
GLoRA: Chavan et al. 2023, arXiv:2306.07967, Eq. 10. Initial values are peft's; those of GLoRA are the paper's.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.adapters.base import Method, PeftFormat
from efficientllm.adapters.lora import STATIC
from efficientllm.registry import register
from efficientllm.typing import PyTree
from efficientllm.weights import Weight, box, dense


class _FullDelta(Weight):
    """Kernel plus a delta of its shape, float32 `[..., in, out]`, which subclasses compute in `delta()`."""

    base: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def dense(self) -> jax.Array:
        return dense(self.base) + self.delta()

    def delta(self) -> jax.Array:
        """Compute what the adapter adds to the kernel."""
        raise NotImplementedError(type(self).__name__)


@flax.struct.dataclass
class LoHa(_FullDelta):
    """LoHa kernel `W + scale (A1 B1) * (A2 B2)`: the delta is the elementwise product of two low-rank matrices.

    `a1` and `a2` are `[..., in, R]`, `b1` and `b2` `[..., R, out]`.
    """

    base: PyTree
    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    scale: float = flax.struct.field(default=1.0, **STATIC)

    def delta(self) -> jax.Array:
        return self.scale * _product(self.a1, self.b1) * _product(self.a2, self.b2)


@flax.struct.dataclass
class LoKr(_FullDelta):
    """LoKr kernel `W + scale C kron (A B)`: `c` `[..., in1, out1]`, `a` `[..., in2, R]`, `b` `[..., R, out2]`.

    `in1 in2` = in, `out1 out2` = out.
    """

    base: PyTree
    c: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(default=1.0, **STATIC)

    def delta(self) -> jax.Array:
        block = _product(self.a, self.b)
        # C kron block: [..., in1, out1] x [..., in2, out2] -> [..., in1, in2, out1, out2] -> [..., in, out].
        blocks = jnp.einsum("...io,...jp->...ijop", self.c, block)
        return self.scale * blocks.reshape(self.shape)


@flax.struct.dataclass
class GLoRA(_FullDelta):
    """GLoRA kernel `W + W * (A1 B1) + A2 B2`: scaled elementwise and shifted.

    The paper's other three terms (C W, D b, E) change a bias, which a kernel does not have.
    """

    base: PyTree
    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array

    def delta(self) -> jax.Array:
        return dense(self.base) * _product(self.a1, self.b1) + _product(self.a2, self.b2)


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")


@dataclasses.dataclass(frozen=True)
class _LowRank(Method):
    rank: int = 8
    target: str = ".*"

    def step_flops(self, shape: Sequence[int], rows: int) -> float:
        """Count the FLOPs of the kernel's gradient, and of the delta with its gradients."""
        return 2 * rows * math.prod(shape) + self._delta_flops(shape)

    def _delta_flops(self, shape):
        return 2 * 6 * math.prod(shape) * self.rank

    def _pairs(self, kernel, names, key, deviations):
        """Draw `(a1, b1, a2, b2)`, boxed, from normal distributions with these standard deviations."""
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
    """LoHa: deltas of a rank up to rank**2, scaled by alpha / rank."""

    alpha: float = 8.0

    learnt = ("a1", "b1", "a2", "b2")
    leaf_type = LoHa
    peft = PeftFormat("LOHA", experts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> LoHa:
        return LoHa(kernel, *self._pairs(kernel, names, key, (1.0, 0.1, 1.0, 0.0)), scale=self.alpha / self.rank)


@register("adapter", "glora")
@dataclasses.dataclass(frozen=True)
class GLoRAMethod(_LowRank):
    """GLoRA: a low-rank scale and a low-rank shift of the kernel, both without effect at step 0."""

    learnt = ("a1", "b1", "a2", "b2")
    leaf_type = GLoRA
    peft = PeftFormat("GLORA", experts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> GLoRA:
        deviation = 1 / math.sqrt(nn.unbox(kernel).shape[-2])
        return GLoRA(kernel, *self._pairs(kernel, names, key, (deviation, 0.0, deviation, 0.0)))


@register("adapter", "lokr")
@dataclasses.dataclass(frozen=True)
class LoKrMethod(_LowRank):
    """LoKr: the Kronecker product of a small dense matrix, zero at step 0, and a low-rank one, times alpha / rank."""

    alpha: float = 8.0

    learnt = ("c", "a", "b")
    leaf_type = LoKr
    peft = PeftFormat("LOKR", experts=False, parts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> LoKr:
        *stack, width_in, width_out = nn.unbox(kernel).shape
        (in1, in2), (out1, out2) = _factors(width_in), _factors(width_out)
        shapes = {"c": (*stack, in1, out1), "a": (*stack, in2, self.rank), "b": (*stack, self.rank, out2)}
        keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
        # kaiming_uniform(a=sqrt(5)) over peft's layout of the factors, [out, in]; the small factor is zero.
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
    """Factor `width` into the two numbers nearest to each other, the smaller first (peft's `decompose_factor=-1`)."""
    small = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return small, width // small
