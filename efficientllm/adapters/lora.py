"""LoRA, and its variants of another scale (RSLoRA), learning rate (LoRA+) or initial value (PiSSA).

LoRA: Hu et al. 2021, arXiv:2106.09685, Eq. 3. RSLoRA: Kalajdzievski 2023, arXiv:2312.03732. LoRA+: Hayou et al. 2024,
arXiv:2402.12354. PiSSA: Meng et al. 2024, arXiv:2404.02948, Eq. 2-4. Initial values and scales are peft's.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from efficientllm.adapters.base import MIXERS_AND_FFNS, Method, PeftFormat
from efficientllm.errors import FieldError
from efficientllm.registry import register
from efficientllm.typing import Params, PyTree
from efficientllm.weights import Axes, Weight, as_input_sharded, axes, box, can_shard_inputs, dense

STATIC = {"pytree_node": False}


@flax.struct.dataclass
class LoRA(Weight):
    """LoRA kernel `W + scale A B`: frozen `base` W `[..., in, out]`, `a` `[..., in, R]` and `b` `[..., R, out]`.

    `key` `[..., 2]` is a random key, set in training steps with dropout: the adapter then drops its input with
    probability `dropout`.
    """

    replace: typing.ClassVar[Callable[..., typing.Any]]  # flax.struct adds it

    base: PyTree
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = flax.struct.field(default=1.0, **STATIC)
    dropout: float = flax.struct.field(default=0.0, **STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def apply(self, x: jax.Array, product: Callable[..., jax.Array], of_rows: Callable[..., jax.Array]) -> jax.Array:
        low = product(dropped(x, self.key, self.dropout), self.a)
        changed = product(x, self.base) + self.scale * product(low.astype(x.dtype), self.b)
        return checkpoint_name(changed, "changed")  # saved for the backward pass instead of both terms

    def axes(self, names: Sequence[str | None]) -> "LoRA":
        return self.replace(
            base=axes(self.base, names),
            **low_rank_axes(names),
            key=None if self.key is None else Axes((*names[:-2], None)),
        )

    def can_shard_inputs(self, shards: int) -> bool:
        return can_shard_inputs(self.base, shards)

    def as_input_sharded(self, shards: int) -> "LoRA":
        return self.replace(base=as_input_sharded(self.base, shards))

    def dense(self) -> jax.Array:
        return dense(self.base) + self.delta()

    def delta(self) -> jax.Array:
        """Compute what the adapter adds to the kernel, float32 `[..., in, out]`."""
        return self.scale * jnp.matmul(self.a, self.b, precision="highest")


def low_rank_axes(names: Sequence[str | None]) -> dict[str, Axes]:
    """Name the logical axes of `a` and `b` around a kernel with the axes `names`."""
    *stack, axis_in, axis_out = names
    return {"a": Axes((*stack, axis_in, None)), "b": Axes((*stack, None, axis_out))}


def dropped(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Apply inverted dropout to `x`; without a key, return `x`.

    `key` is `[..., 2]`. The rows of several kernels (experts) are one array `x`; the first key serves all of them.
    """
    if key is None or not rate:
        return x
    key = jax.random.wrap_key_data(key.reshape(-1, key.shape[-1])[0])
    for axis in jax.sharding.get_abstract_mesh().manual_axes:  # each device has its shard of x
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def seeded(params: Params, key: jax.Array) -> Params:
    """Set this step's dropout key in every leaf with dropout: one key for each leaf, layer and expert."""

    def drops(leaf):
        return getattr(leaf, "dropout", 0) > 0

    def seed_leaf(index, leaf):
        if not drops(leaf):
            return leaf
        keys = jax.random.split(jax.random.fold_in(key, index), leaf.shape[:-2])
        return leaf.replace(key=jax.random.key_data(keys))

    leaves, tree = jax.tree.flatten(params, is_leaf=drops)
    return jax.tree.unflatten(tree, [seed_leaf(index, leaf) for index, leaf in enumerate(leaves)])


@register("adapter", "lora")
@dataclasses.dataclass(frozen=True)
class LoRAMethod(Method):
    """LoRA: rank-`rank` adapters scaled by alpha / rank, around mixer and ffn kernels whose path matches `target`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: str = MIXERS_AND_FFNS

    learnt: typing.ClassVar[tuple[str, ...]] = ("a", "b")
    leaf_type: typing.ClassVar[type[Weight]] = LoRA
    peft = PeftFormat("LORA")

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> PyTree:
        *stack, width_in, width_out = nn.unbox(kernel).shape
        bound = 1 / math.sqrt(width_in)  # kaiming_uniform(a=sqrt(5)), as peft
        a = jax.random.uniform(key, (*stack, width_in, self.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, self.rank, width_out), jnp.float32)
        return self._leaf(kernel, a, b, names)

    def step_flops(self, shape: Sequence[int], rows: int) -> float:
        *stack, width_in, width_out = shape
        return 6 * rows * math.prod(stack) * self.rank * (width_in + width_out)

    def _leaf(self, kernel, a, b, names):
        axes = low_rank_axes(names)
        return LoRA(kernel, box(a, axes["a"]), box(b, axes["b"]), scale=self.scale, dropout=self.dropout)


@register("adapter", "rslora")
@dataclasses.dataclass(frozen=True)
class RSLoRAMethod(LoRAMethod):
    """RSLoRA: LoRA scaled by alpha / sqrt(rank)."""

    peft = PeftFormat("LORA", {"use_rslora": True}, experts=False, fallback="lora")

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / math.sqrt(self.rank)


@register("adapter", "lora_plus")
@dataclasses.dataclass(frozen=True)
class LoRAPlusMethod(LoRAMethod):
    """LoRA+: the learning rate of B is `ratio` times that of A."""

    ratio: float = 16.0

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:  # type: ignore[override]
        return (("/kernel/b$", self.ratio),)


@register("adapter", "pissa")
@dataclasses.dataclass(frozen=True)
class PiSSAMethod(LoRAMethod):
    """PiSSA: A and B start from the kernel's `rank` largest singular values; the residual kernel is frozen.

    At step 0 the model computes what it did before. Raises UserError for a kernel narrower than the rank.
    """

    splits_kernel = True
    peft = PeftFormat("LORA", {"init_lora_weights": "pissa"}, experts=False, parts=False, fallback="lora")

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> PyTree:
        w = nn.unbox(kernel)
        if isinstance(w, Weight):
            raise FieldError(
                "quant", "pissa takes its rank out of the unquantized kernel; take 'float32', or another adapter"
            )
        if self.rank > min(w.shape[-2:]):
            raise FieldError(
                "adapter",
                f"pissa's rank = {self.rank} is too large for a kernel of {w.shape[-2:]}; "
                f"take {min(w.shape[-2:])} at most, or a target without it",
            )
        w = w.astype(jnp.float32)
        # W = U S V'. With its first R columns, A = U_R sqrt(S_R / scale) and B = sqrt(S_R / scale) V'_R (Eq. 2-4), so
        # that scale A B is the kernel's best approximation of rank R.
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[..., : self.rank] / self.scale)
        a, b = u[..., : self.rank] * root[..., None, :], root[..., None] * vt[..., : self.rank, :]
        residual = w - self.scale * jnp.matmul(a, b, precision="highest")
        return self._leaf(box(residual, names), a, b, names)

    def frozen(self, kernel: np.ndarray) -> np.ndarray:
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        return kernel - (u[:, : self.rank] * s[: self.rank]) @ vt[: self.rank]
