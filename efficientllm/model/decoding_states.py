"""States of decoding, a KV cache or a recurrent state of every layer: made empty, sharded, their length checked."""

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.model.backbone import Backbone, parts
from efficientllm.model.blocks import joined, of_each
from efficientllm.registry import build
from efficientllm.sharding import constrain, current_mesh
from efficientllm.typing import PyTree


def init_states(lm: Backbone, batch: int, length: int) -> PyTree:
    """Makes empty states for `length` tokens of `batch` rows, stacked over groups if `lm` scans.

    A block's state is the pair of its mixer's (of several, a tuple of theirs) and its ffn's. Raises UserError for more
    tokens than the position has.
    """
    check_length(lm, length)
    blocks = tuple(
        (joined([mixer.init_state(batch, length) for mixer in mixers]), ffn.init_state(batch, length) if ffn else {})
        for mixers, ffn in parts(lm)
    )
    if not lm.scan:
        return tuple(tuple(blocks[i] for i in stack.blocks) for stack in lm.stacks for _ in stack.groups)

    def stacked(block, numbers):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(numbers), *leaf.shape)), block)

    return tuple(map(stacked, blocks, lm.stacks.layer_numbers))


def pin_states(lm: Backbone, states: PyTree) -> PyTree:
    """Constrains states to their sharding over the mesh in scope; see `state_axes`."""
    if current_mesh() is None:
        return states
    return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), states, state_axes(lm, states))


def state_axes(lm: Backbone, states: PyTree) -> PyTree:
    """Returns the logical axes of every leaf of states: the batch's rows, then those in its module's `state_axes`."""

    def module_axes(module, state):
        axes_of = {} if module is None else module.state_axes

        def leaf_axes(keys, leaf):
            name = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
            axes = (*(None,) * lm.scan, "batch", *axes_of.get(name, ()))
            return *axes, *(None,) * (leaf.ndim - len(axes))

        return jax.tree_util.tree_map_with_path(leaf_axes, state)

    def block_axes(block, state):
        mixers = map(module_axes, block.mixers, of_each(state[0], block.mixers))
        return joined(list(mixers)), module_axes(block.ffn, state[1])

    blocks = parts(lm)
    if lm.scan:
        return tuple(map(block_axes, blocks, states))
    groups = [[blocks[i] for i in stack.blocks] for stack in lm.stacks for _ in stack.groups]
    return tuple(tuple(map(block_axes, *pair)) for pair in zip(groups, states, strict=True))


def check_length(lm: Backbone, length: int, where: str = "a state") -> None:
    """Raises UserError for a row of `length` tokens where the position has fewer; `where` says what asks for them."""
    most = build("position", lm.position).max_positions
    if most is not None and length > most:
        raise UserError(
            f"{where}: {length} tokens, but the position {lm.position!r} has {most} positions; "
            f"give it {length}, or take {most} tokens at most"
        )
