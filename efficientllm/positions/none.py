"""No positional encoding (NoPE): the causal mask alone carries the order (Kazemnejad et al. 2023, arXiv:2305.19466).

A bidirectional model without positions knows of no order.
"""

from efficientllm.positions.base import Position
from efficientllm.registry import register


@register("position", "none")
class NoPosition(Position):
    """No positional encoding."""
