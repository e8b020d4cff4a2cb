"""What a model costs by closed formula: parameters, FLOPs and state bytes, from its parameter tree and its parts.

FLOP convention: a multiply-add is 2; causal attention counts half of its square; an embedding look-up is 0; routers are
counted, the optimiser is not; experts count as far as a token is sent to them.
"""

import math

import flax.linen as nn
import jax

from efficientllm.model import parts
from efficientllm.optim.rules import path_of

FLOP_CONVENTION = "causal = half, embedding lookup = 0, router counted, optimiser outside"


def parameters(lm, boxed):
    """`{"total", "active"}`: active counts an expert as far as a token is sent to it, and the whole of the rest."""
    leaves = list(_leaves(boxed))
    total = sum(math.prod(shape) for _, shape, _ in leaves)
    active = sum(math.prod(shape) * _active_fraction(lm, path, axes) for path, shape, axes in leaves)
    return {"total": total, "active": round(active)}


def forward_flops(lm, boxed, length, pairs=None):
    """Forward matmul FLOPs of one row of `length` tokens; `pairs` of query and key default to the causal half."""
    pairs = length * length / 2 if pairs is None else pairs
    linear = sum(
        2 * length * math.prod(shape) * _active_fraction(lm, path, axes)
        for path, shape, axes in _leaves(boxed)
        if path.endswith("kernel")
    )
    head = 2 * length * lm.dim * lm.vocab_size if lm.tied else 0
    mixers = sum(mixer.mix_flops(pairs) for mixer, _ in parts(lm)) * lm.num_groups
    return linear + head + mixers


def train_flops(lm, boxed, length):
    """FLOPs of one row of `length` tokens, forward and backward: each product has two more of its size backward."""
    return 3 * forward_flops(lm, boxed, length)


def state_bytes(lm, length):
    """Bytes of decode state that one row of `length` tokens holds in all layers."""
    return sum(mixer.state_bytes(length) for mixer, _ in parts(lm)) * lm.num_groups


def _leaves(boxed):
    flat = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for keys, leaf in flat[0]:
        yield path_of(keys), leaf.value.shape, leaf.names


def _active_fraction(lm, path, axes):
    if "expert" not in axes:
        return 1
    block = next(part for part in path.split("/") if part.startswith("block_"))
    _, ffn = parts(lm)[int(block.removeprefix("block_"))]
    return ffn.active_fraction
