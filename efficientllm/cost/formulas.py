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
from efficientllm.model import LM, parts
from efficientllm.weights import Weight, path_of

PyTree = typing.Any  # the model's parameters, boxed with their logical axes where named `boxed`
FULL = Full()
FLOP_CONVENTION = "causal = half, embedding lookup = 0, router counted, optimiser outside"


def count_parameters(lm: LM, boxed: PyTree) -> dict[str, int]:
    """Counts parameters, `{"total", "active"}`: active weights an expert by the share of tokens routed to it."""
    all_leaves = list(leaves(boxed))
    total = sum(math.prod(shape) for _, shape, _ in all_leaves)
    active = sum(math.prod(shape) * active_fraction(lm, path, axes) for path, shape, axes in all_leaves)
    return {"total": total, "active": round(active)}


def forward_flops(lm: LM, boxed: PyTree, length: int, executed: bool = False) -> float:
    """Forward matmul FLOPs of one row of `length` tokens.

    executed: count what the kernels compute, including products that a mask then drops.
    """
    linear = sum(flops for _, flops in _kernel_flops(lm, boxed, length))
    head = _tied_head_flops(lm, length)
    mixers = sum(mixer.mix_flops(length, executed) for mixer, _ in parts(lm)) * lm.num_groups
    return linear + head + mixers


def train_flops(lm: LM, boxed: PyTree, length: int, method: Method = FULL) -> float:
    """Forward and backward FLOPs of one row of `length` tokens.

    The backward pass adds two products of the same size: the gradient of the input, and that of a trainable kernel. No
    gradient flows below the lowest trainable layer (for a `method` with unrolled layers). `boxed` is the base model's
    tree; `adapter_flops` counts what a method adds to it.
    """
    lowest = _lowest_group(lm, boxed, method)

    def products(path):
        return 1 + (_group(path) >= lowest) + method.trains(path, lm)

    linear = sum(products(path) * flops for path, flops in _kernel_flops(lm, boxed, length))
    head = (2 + method.trains("embedding", lm)) * _tied_head_flops(lm, length)
    mixers = sum(mixer.mix_flops(length) for mixer, _ in parts(lm))
    return linear + head + mixers * (lm.num_groups + 2 * (lm.num_groups - max(lowest, 0)))


def adapter_flops(lm: LM, boxed: PyTree, length: int, rows: int, method: Method) -> float:
    """FLOPs that a tuning method's own parameters add to a training step of `rows` rows of `length` tokens."""
    return sum(
        method.step_flops(shape, rows * _rows(lm, path, length) * active_fraction(lm, path, axes))
        for path, shape, axes in leaves(boxed)
        if method.targets(path)
    )


def step_flops(lm: LM, boxed: PyTree, length: int, rows: int, method: Method = FULL) -> float:
    """FLOPs of a training step of `rows` rows of `length` tokens."""
    return rows * train_flops(lm, boxed, length, method) + adapter_flops(lm, boxed, length, rows, method)


def _lowest_group(lm, boxed, method):
    """The lowest group with trainable parameters; -1 if the embedding is trainable or the layers are scanned."""
    learns = [_group(path) for path, _, _ in leaves(boxed) if method.trains(path, lm)]
    return min(learns, default=-1)


def _group(path):
    """The group of a parameter in unrolled layers; -1 for embeddings and scanned layers, inf for norm and head."""
    name = path.split("/")[0]
    if name in ("norm", "head"):
        return math.inf
    return int(name.removeprefix("group_")) if name.startswith("group_") else -1


def state_bytes(lm: LM, length: int) -> int:
    """Bytes of decode state (KV caches and the like) of one row of `length` tokens, in all layers."""
    group_bytes = [layer.state_bytes(length) for block in parts(lm) for layer in block if layer is not None]
    return sum(group_bytes) * lm.num_groups


def decode_bytes(lm: LM, boxed: PyTree, params: PyTree, rows: int, length: int) -> float:
    """Bytes that a decode step must read: the weights that `rows` tokens use, and the states of `length` tokens.

    `params` are the stored parameters, quantized or not. With k of E experts per token, B tokens use
    E (1 - (1 - k/E)^B) experts on average; of an untied embedding they read B rows.
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))[0]
    sizes = {
        path_of(keys): sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf)) for keys, leaf in flat
    }

    def share_read(path, shape, axes):
        if path == "embedding" and not lm.tied:
            return min(1, rows / shape[0])
        return 1 - (1 - active_fraction(lm, path, axes)) ** rows

    weights = sum(sizes[path] * share_read(path, shape, axes) for path, shape, axes in leaves(boxed))
    return weights + rows * state_bytes(lm, length)


def decode_flops(lm: LM, boxed: PyTree, length: int) -> float:
    """Forward FLOPs of decoding the last token of a row of `length` tokens."""
    return forward_flops(lm, boxed, length) - forward_flops(lm, boxed, length - 1)


def _kernel_flops(lm, boxed, length):
    """`(path, forward FLOPs)` of each kernel for a row of `length` tokens."""
    for path, shape, axes in leaves(boxed):
        if path.endswith("kernel"):
            yield path, 2 * _rows(lm, path, length) * math.prod(shape) * active_fraction(lm, path, axes)


def _tied_head_flops(lm, length):
    return 2 * length * lm.dim * lm.vocab_size if lm.tied else 0


def leaves(boxed: PyTree) -> Iterator[tuple[str, tuple[int, ...], tuple]]:
    """Yields `(path, shape, logical axes)` of each parameter; without a flax box the axes are ()."""
    flat = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for keys, leaf in flat[0]:
        in_box = isinstance(leaf, nn.LogicallyPartitioned)
        yield path_of(keys), leaf.value.shape if in_box else leaf.shape, leaf.names if in_box else ()


def part_of(lm: LM, path: str) -> typing.Any:
    """The mixer or ffn that a parameter belongs to; None for parameters outside the blocks."""
    names = path.split("/")
    block = next((name for name in names if name.startswith("block_")), None)
    if block is None:
        return None
    mixer, ffn = parts(lm)[int(block.removeprefix("block_"))]
    return {"mixer": mixer, "ffn": ffn}.get(names[names.index(block) + 1])


def _rows(lm, path, length):
    """Rows that a kernel multiplies: one a token, unless its layer's `kernel_rows` says otherwise."""
    layer = part_of(lm, path)
    return length if layer is None else layer.kernel_rows(path, length)


def active_fraction(lm: LM, path: str, axes: Sequence[str | None]) -> float:
    """The share of a parameter that a token uses."""
    return part_of(lm, path).active_fraction if "expert" in axes else 1
