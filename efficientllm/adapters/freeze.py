"""Full fine-tuning and layer freezing: methods that choose trainable parameters and add no adapters."""

import dataclasses
import itertools
import re

from efficientllm.adapters.base import Method
from efficientllm.errors import FieldError
from efficientllm.model import Backbone, half_layers
from efficientllm.registry import register


@register("adapter", "full")
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter is trainable."""

    trains_all = True

    def trains(self, path: str, lm: Backbone) -> bool:
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

    def check(self, lm: Backbone) -> None:
        layers = _group_sizes(lm)[0] / 2
        count = self.last or self.first
        if bool(self.last) == bool(self.first) or count < 0:
            raise FieldError("adapter", f"freeze has last = {self.last} and first = {self.first}; set one, above 0")
        if self._groups(lm) is None:
            raise FieldError(
                "adapter",
                f"cannot freeze by {count} layers: the model has {lm.num_layers}, in groups of {layers:g}; "
                f"take a multiple of {layers:g}, at most {lm.num_layers}",
            )

    def trains(self, path: str, lm: Backbone) -> bool:
        group = re.search(r"\bgroup_(\d+)/", path)
        if group is None:
            return False
        groups = self._groups(lm)
        return int(group[1]) >= lm.num_groups - groups if self.last else int(group[1]) < groups

    def _groups(self, lm):
        """How many groups have as many layers together; None where no number of them has."""
        sizes = _group_sizes(lm)
        sums = itertools.accumulate(sizes[::-1] if self.last else sizes)
        return next((n for n, total in enumerate(sums, 1) if total == 2 * (self.last or self.first)), None)


def _group_sizes(lm):
    """Half layers of each group."""
    sizes = [half_layers(tuple(lm.blocks[i] for i in stack.blocks)) for stack in lm.stacks]
    return [size for stack, size in zip(lm.stacks, sizes, strict=True) for _ in stack.groups]
