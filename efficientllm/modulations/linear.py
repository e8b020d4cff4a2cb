"""adaLN-Zero: each block projects the conditioning vector to shifts, scales and gates that start at zero."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.modulations.base import BOTH, Affine, Branches, ConditionVectors, Modulation
from efficientllm.ops.attention import Context
from efficientllm.registry import register


def split_branches(vectors: jax.Array, branches: Branches) -> tuple[Affine, ...]:
    """Splits `[B, 3 n, D]` into the shift, scale and gate of each of the n branches that are True."""
    thirds = iter(jnp.split(vectors, sum(branches), 1))
    return tuple(Affine(*jnp.split(next(thirds), 3, 1)) if acts else Affine() for acts in branches)


@register("modulation", "linear")
class AdaLNZero(Modulation):
    """adaLN-Zero (DiT: Peebles & Xie 2022, arXiv:2212.09748, Section 3.2): `Linear_6D(SiLU(condition))`.

    Each branch has three vectors: a block with two parallel mixers has nine (the dual attention of SD3.5).
    """

    precision: str

    @nn.compact
    def __call__(self, ctx: Context, dim: int, branches: Branches = BOTH) -> tuple[Affine, ...]:
        if not any(branches):
            return (Affine(),) * len(branches)
        vectors = ConditionVectors(3 * sum(branches), dim, self.precision)
        nn.share_scope(self, vectors)
        return split_branches(vectors(self.condition(ctx)), branches)
