"""Full fine-tuning and layer freezing: methods that choose trainable parameters and add no adapters."""

import dataclasses
import re

from efficientllm.adapters.base import Method
from efficientllm.errors import UserError
from efficientllm.model import LM, half_layers
from efficientllm.registry import register


@register("adapter", "full")
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter is trainable."""

    trains_all = True

    def trains(self, path: str, lm: LM) -> bool:
        return True


@register("adapter", "freeze")
@dataclasses.dataclass(frozen=True)
class Freeze(Method):
    """Layer freezing: only the `last` layers, or only the `first`, are trainable.

    No gradient flows below the lowest trainable layer. Embeddings, the last norm and the head are frozen. The count is
    a multiple of the layers in one group of the model's pattern.
    """

    last: int = 0
    first: int = 0

    unrolled = True

    def check(self, lm: LM) -> None:
        layers = half_layers(lm.blocks) / 2
        count = self.last or self.first
        if bool(self.last) == bool(self.first) or count < 0:
            raise UserError(f"config.adapter = freeze(last={self.last}, first={self.first}): set one of them, above 0")
        if count % layers or count > lm.num_layers:
            raise UserError(
                f"config.adapter: freeze of {count} layers: the model has {lm.num_layers}, in groups of {layers:g}"
            )

    def trains(self, path: str, lm: LM) -> bool:
        group = re.search(r"\bgroup_(\d+)/", path)
        if group is None:
            return False
        groups = int((self.last or self.first) * 2 // half_layers(lm.blocks))
        return int(group[1]) >= lm.num_groups - groups if self.last else int(group[1]) < groups
