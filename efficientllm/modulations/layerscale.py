"""LayerScale: learned constant gates of a block's residual branches."""

import flax.linen as nn

from efficientllm.modulations.base import BOTH, Affine, Branches, Modulation
from efficientllm.ops.attention import Context
from efficientllm.registry import register


@register("modulation", "layerscale")
class LayerScale(Modulation):
    """LayerScale `x + diag(gate) branch(norm(x))` (CaiT: Touvron et al. 2021, arXiv:2103.17239, Eq. 2).

    Args:
      initial: the gates' initial value. The paper takes 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond.
    """

    initial: float = 0.1

    @nn.compact
    def __call__(self, ctx: Context, dim: int, branches: Branches = BOTH) -> tuple[Affine, ...]:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.initial), ("embed",))
        names = ["mixer", "ffn", *(f"mixer_{i}" for i in range(1, len(branches) - 1))]
        return tuple(Affine(gate=self.param(f"{name}_gate", init, (dim,))[None, None]) for name in names)
