"""What a training run logs before its first step: size, device, and the trainable parameters of each part."""

import collections
import math

import jax

from efficientllm.cost import formulas
from efficientllm.train.setup import Setup
from efficientllm.weights import path_of


def headline(setup: Setup) -> str:
    """Formats the size of a step, the devices, how long compilation took, and the table of `what_learns`."""
    devices, seconds = jax.devices(), setup.compile_s["compile"]
    rows = f"x {setup.length} tokens"
    if setup.objective.counted != "tokens":
        rows = f"{setup.objective.counted} of {setup.length} tokens"
    first = (
        f"{setup.config.name}: {setup.config.train.steps} steps of {setup.batch_size} {rows} "
        f"on {len(devices)} x {devices[0].device_kind}; "
        f"{'its program was loaded' if setup.program_loads else 'compiled'} in {seconds:.1f} s"
    )
    return "\n".join([first, *what_learns(setup)])


def what_learns(setup: Setup) -> list[str]:
    """Formats a line for each part of the model (`Backbone.part_of`); of a model in one part there is no table."""
    part_of = setup.lm.part_of
    of_model: collections.Counter[str] = collections.Counter()
    of_method: collections.Counter[str] = collections.Counter()
    for path, shape, _ in formulas.leaves(setup.boxed):
        of_model[part_of(path)] += math.prod(shape)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(setup.shaped.params):
        of_method[part_of(path_of(keys))] += leaf.size
    if len(of_model) < 2:
        return []
    rows = [(part, f"{count:,}", f"{of_method[part]:,}") for part, count in of_model.items()]
    rows.insert(0, ("part", "parameters", "trainable"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{part:<{widths[0]}}  {all_:>{widths[1]}}  {trained:>{widths[2]}}" for part, all_, trained in rows]
