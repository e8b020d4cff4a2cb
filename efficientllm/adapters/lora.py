"""Low-rank adapters and the methods that differ from LoRA in a scale, a learning rate or an initial value.

LoRA: Hu et al. 2021, arXiv:2106.09685, Eq. 3. RSLoRA: Kalajdzievski 2023, arXiv:2312.03732. LoRA+: Hayou et al. 2024,
arXiv:2402.12354. PiSSA: Meng et al. 2024, arXiv:2404.02948, Eq. 2-4. Initial values and scales are peft's.
"""

import dataclasses
import math
import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from efficientllm.adapters.base import Method, PeftFormat
from efficientllm.errors import UserError
from efficientllm.registry import register
from efficientllm.weights import Axes, Weight, as_input_sharded, axes, box, can_shard_inputs, dense

STATIC = {"pytree_node": False}


@flax.struct.dataclass
class LoRA(Weight):
    """`W + scale A B` for a frozen `base` W `[..., in, out]`, `a` `[..., in, R]` and `b` `[..., R, out]`.

    `key` `[..., 2]` is set in training steps that drop: the adapter's input is then dropped with probability `dropout`.
    """

    base: typing.Any
    a: typing.Any
    b: typing.Any
    key: typing.Any = None
    scale: float = flax.struct.field(default=1.0, **STATIC)
    dropout: float = flax.struct.field(default=0.0, **STATIC)

    @property
    def shape(self):
        return self.base.shape

    def apply(self, x, product, of_rows):
        low = product(dropped(x, self.key, self.dropout), self.a)
        changed = product(x, self.base) + self.scale * product(low.astype(x.dtype), self.b)
        return checkpoint_name(changed, "changed")  # kept for the backward pass instead of both terms

    def axes(self, names):
        return self.replace(
            base=axes(self.base, names),
            **low_rank_axes(names),
            key=None if self.key is None else Axes((*names[:-2], None)),
        )

    def can_shard_inputs(self, shards):
        return can_shard_inputs(self.base, shards)

    def as_input_sharded(self, shards):
        return self.replace(base=as_input_sharded(self.base, shards))

    def dense(self):
        return dense(self.base) + self.delta()

    def delta(self):
        """What the adapter adds to the kernel, float32."""
        return self.scale * jnp.matmul(self.a, self.b, precision="highest")


def low_rank_axes(names):
    """The axes of `a` and `b`."""
    *stack, axis_in, axis_out = names
    return {"a": Axes((*stack, axis_in, None)), "b": Axes((*stack, None, axis_out))}


def dropped(x, key, rate):
    """Inverted dropout of `x`; none without a key. Of the keys of several kernels (experts), whose rows `x` holds
    together, the first serves all."""
    if key is None or not rate:
        return x
    key = jax.random.wrap_key_data(key.reshape(-1, key.shape[-1])[0])
    for axis in jax.sharding.get_abstract_mesh().manual_axes:  # devices that each see their own part of x
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def seeded(params, key):
    """The parameters with a key for this step's dropout in every leaf that drops: one a leaf, layer and expert."""
    drops = lambda leaf: getattr(leaf, "dropout", 0) > 0  # noqa: E731

    def one(index, leaf):
        if not drops(leaf):
            return leaf
        keys = jax.random.split(jax.random.fold_in(key, index), leaf.shape[:-2])
        return leaf.replace(key=jax.random.key_data(keys))

    leaves, tree = jax.tree.flatten(params, is_leaf=drops)
    return jax.tree.unflatten(tree, [one(index, leaf) for index, leaf in enumerate(leaves)])


@register("adapter", "lora")
@dataclasses.dataclass(frozen=True)
class LoRAMethod(Method):
    """Rank-`rank` adapters scaled by alpha / rank, around every kernel of a mixer or ffn whose path has `target`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: str = ".*"

    learnt: typing.ClassVar[tuple[str, ...]] = ("a", "b")
    leaf_type: typing.ClassVar[type[Weight]] = LoRA
    peft = PeftFormat("LORA")

    @property
    def scale(self):
        return self.alpha / self.rank

    def wrap(self, held, names, key):
        *stack, width_in, width_out = nn.unbox(held).shape
        bound = 1 / math.sqrt(width_in)  # kaiming_uniform(a=sqrt(5)), as peft
        a = jax.random.uniform(key, (*stack, width_in, self.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, self.rank, width_out), jnp.float32)
        return self._leaf(held, a, b, names)

    def step_flops(self, shape, rows):
        *stack, width_in, width_out = shape
        return 6 * rows * math.prod(stack) * self.rank * (width_in + width_out)

    def _leaf(self, held, a, b, names):
        axes = low_rank_axes(names)
        return LoRA(held, box(a, axes["a"]), box(b, axes["b"]), scale=self.scale, dropout=self.dropout)


@register("adapter", "rslora")
@dataclasses.dataclass(frozen=True)
class RSLoRAMethod(LoRAMethod):
    """LoRA scaled by alpha / sqrt(rank)."""

    peft = PeftFormat("LORA", {"use_rslora": True}, experts=False, fallback="lora")

    @property
    def scale(self):
        return self.alpha / math.sqrt(self.rank)


@register("adapter", "lora_plus")
@dataclasses.dataclass(frozen=True)
class LoRAPlusMethod(LoRAMethod):
    """LoRA whose B learns `ratio` times as fast as A."""

    ratio: float = 16.0

    @property
    def rates(self):
        return (("/kernel/b$", self.ratio),)


@register("adapter", "pissa")
@dataclasses.dataclass(frozen=True)
class PiSSAMethod(LoRAMethod):
    """LoRA that starts from the `rank` largest singular values of the kernel, and freezes the rest of it.

    A kernel narrower than the rank is refused. The model computes the same as before at step 0.
    """

    splits_kernel = True
    peft = PeftFormat("LORA", {"init_lora_weights": "pissa"}, experts=False, parts=False, fallback="lora")

    def wrap(self, held, names, key):
        kernel = nn.unbox(held)
        if isinstance(kernel, Weight):
            raise UserError("config.adapter: pissa takes its rank out of the kernel, which config.quant has rounded")
        if self.rank > min(kernel.shape[-2:]):
            raise UserError(f"config.adapter: pissa(rank={self.rank}) of a kernel of {kernel.shape[-2:]}: too large")
        kernel = kernel.astype(jnp.float32)
        u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
        root = jnp.sqrt(s[..., : self.rank] / self.scale)
        a, b = u[..., : self.rank] * root[..., None, :], root[..., None] * vt[..., : self.rank, :]
        rest = kernel - self.scale * jnp.matmul(a, b, precision="highest")
        return self._leaf(box(rest, names), a, b, names)

    def frozen(self, kernel):
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        return kernel - (u[:, : self.rank] * s[: self.rank]) @ vt[: self.rank]
