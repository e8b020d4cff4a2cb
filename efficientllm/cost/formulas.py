"""Closed formulas for a model's parameters, FLOPs and decode-state bytes, from its parameter tree and layers.

FLOP convention: a multiply-add is 2; causal attention counts half of its square; an embedding lookup is 0; routers are
counted, the optimiser is not; an expert counts by the share of tokens routed to it; only matrix products count.
"""

import math
import typing
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax

from efficientllm.adapters.base import Method
from efficientllm.adapters.freeze import Full
from efficientllm.mixers.base import Mixer
from efficientllm.model import Backbone, parts
from efficientllm.model.blocks import Stack
from efficientllm.weights import Weight, path_of

PyTree = typing.Any  # the model's parameters, boxed with their logical axes where named `boxed`
FULL = Full()
FLOP_CONVENTION = "causal = half, embedding lookup = 0, router counted, optimiser outside"


def count_parameters(lm: Backbone, boxed: PyTree) -> dict[str, int]:
    """Counts parameters, `{"total", "active"}`: active weights an expert by the share of tokens routed to it."""
    all_leaves = list(leaves(boxed))
    total = sum(math.prod(shape) for _, shape, _ in all_leaves)
    active = sum(math.prod(shape) * active_fraction(lm, path, axes) for path, shape, axes in all_leaves)
    return {"total": total, "active": round(active)}


def forward_flops(lm: Backbone, boxed: PyTree, length: int, executed: bool = False) -> float:
    """Forward matmul FLOPs of one row of `length` tokens.

    executed: count what the kernels compute, including products that a mask then drops.
    """
    linear = sum(flops for _, flops in _kernel_flops(lm, boxed, length))
    head = lm.shared_head_flops(length)
    branches = sum(mixer_flops(branch, tokens, executed) for branch, tokens in lm.branches().values())
    return linear + head + mixer_flops(lm, length, executed) + branches


def mixer_flops(lm: Backbone, length: int, executed: bool = False) -> float:
    """Those of `forward_flops` that are products of activations, in the mixers of all blocks."""
    return sum(of_group * len(stack.groups) for stack, of_group in stack_flops(lm, length, executed))


def request_flops(lm: Backbone, boxed: PyTree, length: int) -> float:
    """Those of `forward_flops` that depend on the condition of a row alone: a sampler's steps share them."""
    return sum(flops for path, flops in _kernel_flops(lm, boxed, length) if lm.is_of_request(path))


def train_flops(lm: Backbone, boxed: PyTree, length: int, method: Method = FULL) -> float:
    """Forward and backward FLOPs of one row of `length` tokens.

    The backward pass adds two products of the same size: the gradient of the input, and that of a trainable kernel. No
    gradient flows below the lowest trainable layer (for a `method` with unrolled layers). `boxed` is the base model's
    tree; `adapter_flops` counts what a method adds to it.
    """
    lowest = _lowest_group(lm, boxed, method)

    def learns(path):
        return method.trains(path, lm) or method.targets(path)

    def products(path):
        of_input = _group(lm, path) >= lowest and lm.has_input_gradient(path, learns)
        return 1 + of_input + method.trains(path, lm)

    linear = sum(products(path) * flops for path, flops in _kernel_flops(lm, boxed, length))
    head = (2 + method.trains("embedding", lm)) * lm.shared_head_flops(length)
    mixers = 0.0
    for stack, of_group in stack_flops(lm, length):
        with_gradients = sum(group >= lowest for group in stack.groups)
        mixers += of_group * (len(stack.groups) + 2 * with_gradients)
    for prefix, (branch, tokens) in lm.branches().items():
        with_gradients = lm.has_input_gradient(f"{prefix}groups/", learns)
        mixers += mixer_flops(branch, tokens) * (1 + 2 * with_gradients)
    return linear + head + mixers


def adapter_flops(lm: Backbone, boxed: PyTree, length: int, rows: int, method: Method) -> float:
    """FLOPs that a tuning method's own parameters add to a training step of `rows` rows of `length` tokens."""
    return sum(
        method.step_flops(shape, rows * _rows(lm, path, length) * active_fraction(lm, path, axes))
        for path, shape, axes in leaves(boxed)
        if method.targets(path)
    )


def step_flops(lm: Backbone, boxed: PyTree, length: int, rows: int, method: Method = FULL) -> float:
    """FLOPs of a training step of `rows` rows of `length` tokens."""
    return rows * train_flops(lm, boxed, length, method) + adapter_flops(lm, boxed, length, rows, method)


def _lowest_group(lm, boxed, method):
    """The lowest group with trainable parameters; -1 if the embedding is trainable or the layers are scanned."""
    learns = [_group(lm, path) for path, _, _ in leaves(boxed) if method.trains(path, lm)]
    return min(learns, default=-1)


def _group(lm, path):
    """The group of a parameter in unrolled layers; -1 for embeddings and scanned layers, inf behind the blocks."""
    name = path.split("/")[0]
    if name in lm.behind_blocks:
        return math.inf
    return int(name.removeprefix("group_")) if name.startswith("group_") else -1


def state_bytes(lm: Backbone, length: int) -> int:
    """Bytes of decode state (KV caches and the like) of one row of `length` tokens, in all layers."""
    block_bytes = [sum(layer.state_bytes(length) for layer in block.by_name().values()) for block in parts(lm)]
    return sum(one * len(numbers) for one, numbers in zip(block_bytes, lm.stacks.layer_numbers, strict=True))


def decode_bytes(lm: Backbone, boxed: PyTree, params: PyTree, rows: int, length: int) -> float:
    """Bytes that a decode step must read: the weights that `rows` tokens use, and the states of `length` tokens."""
    return read_weight_bytes(lm, boxed, params, rows, in_steps=True) + rows * state_bytes(lm, length)


def read_weight_bytes(lm: Backbone, boxed: PyTree, params: PyTree, tokens: int, in_steps: bool = False) -> float:
    """Bytes of the weights that a pass over `tokens` tokens must read; `in_steps` without those of `request_flops`.

    `params` are the stored parameters, quantized or not. With k of E experts per token, B tokens use
    E (1 - (1 - k/E)^B) experts on average; of an untied embedding they read B rows.
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))[0]
    sizes = {
        path_of(keys): sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf)) for keys, leaf in flat
    }

    def share_read(path, shape, axes):
        if path == "embedding" and not lm.tied:
            return min(1, tokens / shape[0])
        return 1 - (1 - active_fraction(lm, path, axes)) ** tokens

    read = (leaf for leaf in leaves(boxed) if not (in_steps and lm.is_of_request(leaf[0])))
    return sum(sizes[path] * share_read(path, shape, axes) for path, shape, axes in read)


def decode_flops(lm: Backbone, boxed: PyTree, length: int) -> float:
    """Forward FLOPs of decoding the last token of a row of `length` tokens."""
    return forward_flops(lm, boxed, length) - forward_flops(lm, boxed, length - 1)


def _kernel_flops(lm, boxed, length):
    """`(path, forward FLOPs)` of each kernel for a row of `length` tokens."""
    for path, shape, axes in leaves(boxed):
        if path.endswith("kernel"):
            yield path, 2 * _rows(lm, path, length) * math.prod(shape) * active_fraction(lm, path, axes)


def stack_flops(lm: Backbone, length: int, executed: bool = False) -> list[tuple[Stack, float]]:
    """Counts `Backbone.mix_flops` of a group of each stack of layers."""
    blocks = parts(lm)
    return [
        (stack, sum(lm.mix_flops(mixer, length, executed) for i in stack.blocks for mixer in blocks[i].mixers))
        for stack in lm.stacks
    ]


def leaves(boxed: PyTree) -> Iterator[tuple[str, tuple[int, ...], tuple]]:
    """Yields `(path, shape, logical axes)` of each parameter; without a flax box the axes are ()."""
    flat = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for keys, leaf in flat[0]:
        in_box = isinstance(leaf, nn.LogicallyPartitioned)
        yield path_of(keys), leaf.value.shape if in_box else leaf.shape, leaf.names if in_box else ()


def _rows(lm, path, length):
    """Rows that a kernel multiplies: one a token, unless its layer's `kernel_rows` says otherwise."""
    layer = lm.layer_of(path)
    ordered = lm.order != "causal" and isinstance(layer, Mixer)
    return (lm if layer is None else layer).kernel_rows(path, length, *[lm.order] * ordered)


def active_fraction(lm: Backbone, path: str, axes: Sequence[str | None]) -> float:
    """The share of a parameter that a token uses."""
    return lm.layer_of(path).active_fraction if "expert" in axes else 1
