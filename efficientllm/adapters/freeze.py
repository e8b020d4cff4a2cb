"""Full fine-tuning and layer freezing: methods that choose trainable parameters and add no adapters."""

import dataclasses
import functools
import itertools
import re

import jax

from efficientllm.adapters.base import Method
from efficientllm.errors import FieldError, UserError
from efficientllm.model import Backbone, abstract_params, half_layers
from efficientllm.registry import register
from efficientllm.untrusted import patterns
from efficientllm.weights import is_box, path_of


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
    """Layer freezing: only the `last` layers, only the `first`, or only the parameters of `train` are trainable.

    No gradient flows below the lowest trainable layer. Embeddings, the last norm and the head are frozen. The count is
    a multiple of the layers in one group of the model's pattern.

    Args:
      train: a regex over parameter paths, such as '^vision/projector/'.
    """

    last: int = 0
    first: int = 0
    train: str = ""

    @property
    def unrolled(self) -> bool:  # type: ignore[override]
        """Whether layers are unstacked: parameters that a regex chooses are stacks, or in no layer."""
        return not self.train

    def check(self, lm: Backbone) -> None:
        if self.train:
            self._check_train(lm)
            return
        layers = _group_sizes(lm)[0] / 2
        count = self.last or self.first
        if bool(self.last) == bool(self.first) or count < 0:
            raise FieldError(
                "adapter", f"freeze has last = {self.last} and first = {self.first}; set one, above 0, or train"
            )
        if self._groups(lm) is None:
            raise FieldError(
                "adapter",
                f"cannot freeze by {count} layers: the model has {lm.num_layers}, in groups of {layers:g}; "
                f"take a multiple of {layers:g}, at most {lm.num_layers}",
            )

    def _check_train(self, lm):
        if self.last or self.first:
            raise FieldError("adapter", f"freeze has train = {self.train!r}, and a count of layers; set one of them")
        boxed = jax.tree_util.tree_leaves_with_path(abstract_params(lm), is_leaf=is_box)
        paths = [path_of(keys) for keys, _ in boxed]
        if not any(self.trains(path, lm) for path in paths):
            raise FieldError("adapter", f"train = {self.train!r} matches no parameter; there are {', '.join(paths)}")

    def trains(self, path: str, lm: Backbone) -> bool:
        if self.train:
            return bool(_compiled(self.train).search(path))
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


@functools.cache
def _compiled(expression):
    try:
        return patterns.compile(expression, "train")
    except UserError as error:
        raise FieldError("adapter", str(error)) from None


def _group_sizes(lm):
    """Half layers of each group."""
    sizes = [half_layers(tuple(lm.blocks[i] for i in stack.blocks)) for stack in lm.stacks]
    return [size for stack, size in zip(lm.stacks, sizes, strict=True) for _ in stack.groups]
