"""Random weights for measuring times and bytes; the initialization of one group of layers is compiled for all."""

import math
import typing
from collections.abc import Callable

import jax
from flax import linen as nn
from flax import traverse_util

from efficientllm.model import LM, half_layers, init_params
from efficientllm.typing import Params


def draw(lm: LM, seed: int, each: Callable[[str, jax.Array], typing.Any]) -> Params:
    """Draws initial parameters of an unrolled `lm`, each passed through `each(path, array)`, which may quantize it.

    One program for the whole model would compile every layer: 90 s for the 28 of 1.5B on a GPU.
    """
    small_lm = lm.clone(num_layers=math.lcm(half_layers(lm.blocks), 2) // 2)  # a group; two where it has half a layer
    init = jax.jit(lambda key, name: nn.unbox(init_params(small_lm, key, 8))[name], static_argnames="name")
    shapes = jax.eval_shape(lambda key: init_params(small_lm, key, 8), jax.random.key(seed))
    key, *keys = jax.random.split(jax.random.key(seed), lm.num_groups + 1)
    parts = [(name, name, key) for name in shapes if not name.startswith("group_")]
    parts += [(f"group_{i}", "group_0", key) for i, key in enumerate(keys)]
    params = {}
    for name, template, key in parts:
        drawn = traverse_util.flatten_dict({name: init(key, template)}, sep="/")
        while drawn:
            path, array = drawn.popitem()
            params[path] = each(path, array)
    return traverse_util.unflatten_dict(params, sep="/")
