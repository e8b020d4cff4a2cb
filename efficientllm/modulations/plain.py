"""No modulation: norms and residual sums as they are."""

from efficientllm.modulations.base import BOTH, Affine, Branches, Modulation
from efficientllm.ops.attention import Context
from efficientllm.registry import register


@register("modulation", "plain")
class Plain(Modulation):
    """No modulation."""

    def __call__(self, ctx: Context, dim: int, branches: Branches = BOTH) -> tuple[Affine, ...]:
        return (Affine(),) * len(branches)
