"""Random weights for measuring times and bytes; the initialization of one group of layers is compiled for all."""

import typing
from collections.abc import Callable

import jax
from flax import linen as nn
from flax import traverse_util

from efficientllm.model import Backbone, init_params
from efficientllm.typing import Params


def draw(lm: Backbone, seed: int, transform: Callable[[str, jax.Array], typing.Any]) -> Params:
    """Draws initial parameters of an unrolled `lm`, each passed through `transform(path, array)`, which may quantize.

    One program for the whole model would compile every layer: 90 s for the 28 of 1.5B on a GPU.
    """
    small_lm = lm.shallow()
    init = jax.jit(lambda key, name: nn.unbox(init_params(small_lm, key, 8))[name], static_argnames="name")
    shapes = jax.eval_shape(lambda key: init_params(small_lm, key, 8), jax.random.key(seed))
    key, *keys = jax.random.split(jax.random.key(seed), lm.num_groups + 1)
    groups = [(name, name, key) for name in shapes if not name.startswith("group_")]
    templates = [f"group_{i}" for i, stack in enumerate(lm.stacks) for _ in stack.groups]
    groups += [(f"group_{i}", template, key) for i, (template, key) in enumerate(zip(templates, keys, strict=True))]
    params = {}
    for name, template, key in groups:
        drawn = traverse_util.flatten_dict({name: init(key, template)}, sep="/")
        while drawn:
            path, array = drawn.popitem()
            params[path] = transform(path, array)
    return traverse_util.unflatten_dict(params, sep="/")
