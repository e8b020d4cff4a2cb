"""LoHa, LoKr and GLoRA: adapters that materialize a weight delta of the kernel's shape.

LoHa: Hyeon-Woo et al. 2022, arXiv:2108.06098, Eq. 3. LoKr: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, Section 3.
GLoRA: Chavan et al. 2023, arXiv:2306.07967, Eq. 10. Initial values are those of peft 0.21.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efficientllm.adapters.base import MIXERS_AND_FFNS, Method, PeftFormat
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
    """LoKr kernel `W + scale C kron block`: `c` `[..., in1, out1]`, and a block `[..., in2, out2]`.

    `in1 in2` = in, `out1 out2` = out. The block is `a b`, `[..., in2, R]` and `[..., R, out2]`, or `block` itself.
    """

    base: PyTree
    c: jax.Array
    a: jax.Array | None = None
    b: jax.Array | None = None
    block: jax.Array | None = None
    scale: float = flax.struct.field(default=1.0, **STATIC)

    def delta(self) -> jax.Array:
        block = _product(self.a, self.b) if self.block is None else self.block
        # C kron block: [..., in1, out1] x [..., in2, out2] -> [..., in1, in2, out1, out2] -> [..., in, out].
        blocks = jnp.einsum("...io,...jp->...ijop", self.c, block)
        return self.scale * blocks.reshape(self.shape)


@flax.struct.dataclass
class GLoRA(_FullDelta):
    """GLoRA kernel `W + W * (A1 B1) + A2 B2`: scaled elementwise and shifted; bias `b + b D + E + W'C`, `C = Ca Cb`.

    `a1`, `a2` and `c_a` are `[..., in, R]`, `b1` and `b2` `[..., R, out]`, `c_b` `[..., R, 1]`, `d` and `e` `[..., 1]`.
    The last four are None where the layer has no bias.
    """

    base: PyTree
    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    c_a: jax.Array | None = None
    c_b: jax.Array | None = None
    d: jax.Array | None = None
    e: jax.Array | None = None

    def delta(self) -> jax.Array:
        return dense(self.base) * _product(self.a1, self.b1) + _product(self.a2, self.b2)

    def adapted_bias(self, bias: jax.Array) -> jax.Array:
        if self.c_a is None or self.c_b is None:
            return bias
        # One vector for the whole batch, as sums: the FLOP count is of products with the rows of a batch.
        c = jnp.sum(self.c_a * self.c_b.swapaxes(-1, -2), -1, keepdims=True)
        return bias + bias * self.d + self.e + jnp.sum(dense(self.base) * c, -2)


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")


@dataclasses.dataclass(frozen=True)
class _LowRank(Method):
    rank: int = 8
    target: str = MIXERS_AND_FFNS

    def step_flops(self, shape: Sequence[int], rows: int) -> float:
        """Count the FLOPs of the kernel's gradient, and of the delta with its gradients."""
        return 2 * rows * math.prod(shape) + self._delta_flops(shape)

    def _delta_flops(self, shape):
        return 2 * 6 * math.prod(shape) * self.rank

    def _pairs(self, kernel, names, key, is_zero):
        """Draw `(a1, b1, a2, b2)`, boxed: zeros where `is_zero` says so, else kaiming_uniform(a=sqrt(5)).

        The bound is that of PEFT's layout `[out, in]`: of an A 1 / sqrt(in), of a B 1 / sqrt(R).
        """
        *stack, width_in, width_out = nn.unbox(kernel).shape
        shapes = ((*stack, width_in, self.rank), (*stack, self.rank, width_out)) * 2
        bounds = (1 / math.sqrt(width_in), 1 / math.sqrt(self.rank)) * 2
        *outer, axis_in, axis_out = names
        axes = ((*outer, axis_in, None), (*outer, None, axis_out)) * 2
        keys = jax.random.split(key, 4)
        return [
            box(_uniform(subkey, shape, 0 if zero else bound), axis)
            for subkey, shape, bound, axis, zero in zip(keys, shapes, bounds, axes, is_zero, strict=True)
        ]


def _uniform(key, shape, bound):
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound) if bound else jnp.zeros(shape, jnp.float32)


@register("adapter", "loha")
@dataclasses.dataclass(frozen=True)
class LoHaMethod(_LowRank):
    """LoHa: deltas of a rank up to rank**2, scaled by alpha / rank."""

    alpha: float = 8.0

    learnt = ("a1", "b1", "a2", "b2")
    leaf_type = LoHa
    peft = PeftFormat("LOHA", experts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> LoHa:
        # Zero is the factor at the inputs of the second pair, peft's `hada_w2_b`.
        factors = self._pairs(kernel, names, key, (False, False, True, False))
        return LoHa(kernel, *factors, scale=self.alpha / self.rank)


@register("adapter", "glora")
@dataclasses.dataclass(frozen=True)
class GLoRAMethod(_LowRank):
    """GLoRA: a low-rank scale and shift of the kernel, and three terms of the bias, all without effect at step 0."""

    learnt = ("a1", "b1", "a2", "b2", "c_a", "c_b", "d", "e")
    leaf_type = GLoRA
    adapts_bias = True
    peft = PeftFormat("GLORA", experts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> GLoRA:
        return GLoRA(kernel, *self._pairs(kernel, names, key, (False, True, False, True)))

    def wrap_biased(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> GLoRA:
        *stack, width_in, _ = nn.unbox(kernel).shape
        *outer, axis_in, _ = names
        c_b = _uniform(jax.random.fold_in(key, 1), (*stack, self.rank, 1), 1.0)  # kaiming_uniform of one input
        return self.wrap(kernel, names, key).replace(  # type: ignore[attr-defined]
            c_a=box(jnp.zeros((*stack, width_in, self.rank)), (*outer, axis_in, None)),
            c_b=box(c_b, (*outer, None, None)),
            d=box(jnp.zeros((*stack, 1)), (*outer, None)),
            e=box(jnp.zeros((*stack, 1)), (*outer, None)),
        )


@register("adapter", "lokr")
@dataclasses.dataclass(frozen=True)
class LoKrMethod(_LowRank):
    """LoKr: the Kronecker product of a small matrix, zero at step 0, and a block, times alpha / rank.

    The block is low-rank, or a whole matrix where the rank is at least half of its longer side, as in peft.
    """

    alpha: float = 8.0

    learnt = ("c", "a", "b", "block")
    leaf_type = LoKr
    peft = PeftFormat("LOKR", experts=False, parts=False)

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> LoKr:
        *stack, width_in, width_out = nn.unbox(kernel).shape
        (in1, in2), (out1, out2) = _factors(width_in), _factors(width_out)
        shapes = {"c": (in1, out1), "block": (in2, out2)}
        if not self._has_whole_block(in2, out2):
            shapes = {"c": (in1, out1), "a": (in2, self.rank), "b": (self.rank, out2)}
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        # kaiming_uniform(a=sqrt(5)) over peft's layout of the factors, [out, in]; the small factor is zero.
        bounds = {"c": 0.0, "a": 1 / math.sqrt(in2), "b": 1 / math.sqrt(self.rank), "block": 1 / math.sqrt(in2)}
        outer = (*names[:-2], None, None)
        leaves = {
            name: box(_uniform(keys[name], (*stack, *shape), bounds[name]), outer) for name, shape in shapes.items()
        }
        return LoKr(kernel, **leaves, scale=self.alpha / self.rank)

    def _has_whole_block(self, in2, out2):
        return self.rank >= max(in2, out2) / 2

    def _delta_flops(self, shape):
        *stack, width_in, width_out = shape
        (_, in2), (_, out2) = _factors(width_in), _factors(width_out)
        low_rank = 0 if self._has_whole_block(in2, out2) else 6 * in2 * self.rank * out2
        return math.prod(stack) * (low_rank + 6 * width_in * width_out)


def _factors(width):
    """Factor `width` into the two numbers nearest to each other, the smaller first (peft's `decompose_factor=-1`)."""
    small = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return small, width // small
