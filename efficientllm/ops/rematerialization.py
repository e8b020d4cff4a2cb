"""What the backward pass finds of the forward pass, and what it makes again."""

import re

import jax

from efficientllm import sharding
from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime import kernel_choice

EVERYTHING = "everything"
SAVEABLE = "everything_saveable"


def kept(name, parts, decoding):
    """`EVERYTHING`, or the policy of `jax.checkpoint` of what is kept, for `config.model.remat` = `name`.

    On CPUs a loop over layers stores, copies and fetches what is saved; to recompute the elementwise work of attention
    and dense ffns (`recompute_elementwise` of `parts`) takes less, and the saved bytes of a Llama fall to less than
    half. Not on a mesh: what devices send to one another for it would be sent again.
    """
    if name == SAVEABLE:
        return EVERYTHING
    if name != "none":
        return policy(name)
    if decoding or kernel_choice.platform() != "cpu" or not sharding.is_alone():
        return EVERYTHING
    return _not_cheap if all(part is None or part.recompute_elementwise for part in parts) else EVERYTHING


def policy(name):
    """The policy of `jax.checkpoint` called `name`; None, which keeps nothing, for `full`. Raises UserError."""
    if name == "full":
        return None
    known = [policy for policy in dir(jax.checkpoint_policies) if policy.endswith("saveable")]  # the rest take names
    if name not in known:
        raise UserError(
            f"config.model.remat = {name!r}: no such policy; known: none, full, {', '.join(known)}"
            f"{did_you_mean(name, ['none', 'full', *known])}"
        )
    return getattr(jax.checkpoint_policies, name)


CHEAP = re.compile(
    r"add|and|broadcast_in_dim|concatenate|convert_element_type|copy|cos|div|eq|erf|exp|ge|gt|integer_pow|iota|le|log|"
    r"logistic|lt|max|min|mul|ne|neg|not|optimization_barrier|or|pad|pow|reshape|rsqrt|select_n|sharding_constraint|"
    r"sign|sin|slice|sqrt|square|squeeze|stop_gradient|sub|tanh|transpose"
)


def _not_cheap(primitive, *_, **__):
    """Keeps the results of all but elementwise operations and moves."""
    return not CHEAP.fullmatch(primitive.name)
