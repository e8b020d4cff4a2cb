"""States of layers that depend on the condition of a request alone, such as a text's keys and values.

A sampler of pictures computes them once, and every step of its solver reads them.
"""

import jax

from efficientllm.model import Backbone, parts
from efficientllm.model.blocks import joined, mixer_names
from efficientllm.ops.attention import Context
from efficientllm.typing import Params, PyTree


def request_states(lm: Backbone, params: Params, ctx: Context) -> PyTree | None:
    """Computes the states of all layers that depend on the condition in `ctx` alone (`Mixer.request_state`).

    They are laid out as those of `init_states`, with None for a layer without one. None is a model without any.
    """

    def state(layer, params, stacked):
        def apply(params):
            return layer.apply({"params": params}, ctx, method="request_state")

        return jax.vmap(apply)(params) if stacked else apply(params)

    def block_states(block, params):
        names = mixer_names(len(block.mixers))
        mixers = [state(mixer, params[name], lm.scan) for mixer, name in zip(block.mixers, names, strict=True)]
        return joined(mixers), None

    blocks = parts(lm)
    if lm.scan:
        places = [(stack.name, i) for stack in lm.stacks for i in stack.blocks]
        states = tuple(block_states(blocks[i], params[name][f"block_{i}"]) for name, i in places)
    else:
        groups = [(f"group_{group}", stack.blocks) for stack in lm.stacks for group in stack.groups]
        states = tuple(
            tuple(block_states(blocks[i], params[name][f"block_{i}"]) for i in numbers) for name, numbers in groups
        )
    return states if jax.tree.leaves(states) else None
