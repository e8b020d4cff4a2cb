"""Modulation tables: one projection of the conditioning vector for all blocks, and a learned offset of each block."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm.errors import FieldError
from efficientllm.modulations.base import BOTH, Affine, Branches, ConditionVectors, Modulation
from efficientllm.modulations.linear import split_branches
from efficientllm.ops.attention import Context
from efficientllm.registry import register


@register("modulation", "table")
class Table(Modulation):
    """Modulation `table + Linear_6D(SiLU(condition))`: the table is a block's, the map all blocks' (Wan 2.1).

    As PixArt's adaLN-single (Chen et al. 2023, arXiv:2310.00426, Section 2.3). `project` is the shared map:
    `ctx.condition_BD` holds its six vectors side by side, `[B, 6 D]`: three for a block's mixer, three for its ffn. The
    table of a block has those rows of `[6, D]` whose branch is modulated. The end of the model adds a table `[2, D]` to
    the conditioning vector itself.
    """

    precision: str

    @nn.compact
    def __call__(self, ctx: Context, dim: int, branches: Branches = BOTH) -> tuple[Affine, ...]:
        if len(branches) > 2:
            problem = f"table has vectors of a mixer and an ffn, not of {len(branches)} branches"
            raise FieldError("modulation", problem)
        condition_B6D = self.condition(ctx).reshape(-1, 6, dim)
        if not any(branches):
            return (Affine(),) * len(branches)
        start, stop = 3 * branches.index(True), 3 + 3 * branches[-1]
        table_rD = self._table(stop - start, dim)  # r: the rows of this block
        return split_branches(table_rD + condition_B6D[:, start:stop], branches)

    @nn.compact
    def project(self, condition_BD: jax.Array) -> jax.Array:
        vectors = ConditionVectors(6, condition_BD.shape[-1], self.precision)
        nn.share_scope(self, vectors)
        return vectors(condition_BD).reshape(len(condition_BD), -1)

    @nn.compact
    def final(self, condition_BD: jax.Array, precision: str) -> Affine:
        shift_scale = self._table(2, condition_BD.shape[-1]) + condition_BD.astype(jnp.float32)[:, None]
        return Affine(shift=shift_scale[:, :1], scale=shift_scale[:, 1:])

    def _table(self, rows, dim):
        init = nn.with_logical_partitioning(nn.initializers.normal(dim**-0.5), (None, "embed"))
        return self.param("table", init, (rows, dim)).astype(jnp.float32)
