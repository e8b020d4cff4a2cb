"""What a model costs by closed formula: parameters, FLOPs and state bytes, from its parameter tree and its parts.

FLOP convention: a multiply-add is 2; causal attention counts half of its square; an embedding look-up is 0; routers are
counted, the optimiser is not; experts count as far as a token is sent to them; what is not a matrix product is 0.
"""

import math

import flax.linen as nn
import jax

from efficientllm.adapters.freeze import Full
from efficientllm.model import parts
from efficientllm.weights import Weight, path_of

FULL = Full()
FLOP_CONVENTION = "causal = half, embedding lookup = 0, router counted, optimiser outside"


def parameters(lm, boxed):
    """`{"total", "active"}`: active counts an expert as far as a token is sent to it, and the whole of the rest."""
    found = list(leaves(boxed))
    total = sum(math.prod(shape) for _, shape, _ in found)
    active = sum(math.prod(shape) * active_fraction(lm, path, axes) for path, shape, axes in found)
    return {"total": total, "active": round(active)}


def forward_flops(lm, boxed, length, executed=False):
    """Forward matmul FLOPs of one row of `length` tokens.

    What the model needs; or with `executed` what its kernels compute, which also do what a mask then drops.
    """
    linear = sum(flops for _, flops in _kernel_flops(lm, boxed, length))
    head = _tied_head_flops(lm, length)
    mixers = sum(mixer.mix_flops(length, executed) for mixer, _ in parts(lm)) * lm.num_groups
    return linear + head + mixers


def train_flops(lm, boxed, length, method=FULL):
    """FLOPs of one row of `length` tokens, forward and backward.

    Each product has two more of its size backward: the gradient of its input, and that of its kernel if it learns. No
    gradient flows below the lowest layer in which something learns (for a `method` with layers apart). `boxed` is the
    plain model's tree; what a method adds to it is in `adapter_flops`.
    """
    lowest = _lowest_group(lm, boxed, method)

    def passes(path):
        return 1 + (_group(path) >= lowest) + method.trains(path, lm)

    linear = sum(passes(path) * flops for path, flops in _kernel_flops(lm, boxed, length))
    head = (2 + method.trains("embedding", lm)) * _tied_head_flops(lm, length)
    mixers = sum(mixer.mix_flops(length) for mixer, _ in parts(lm))
    return linear + head + mixers * (lm.num_groups + 2 * (lm.num_groups - max(lowest, 0)))


def adapter_flops(lm, boxed, length, rows, method):
    """FLOPs that the leaves of a tuning method add to a training step of `rows` rows of `length` tokens."""
    return sum(
        method.step_flops(shape, rows * _rows(lm, path, length) * active_fraction(lm, path, axes))
        for path, shape, axes in leaves(boxed)
        if method.targets(path)
    )


def step_flops(lm, boxed, length, rows, method=FULL):
    """FLOPs of a training step of `rows` rows of `length` tokens."""
    return rows * train_flops(lm, boxed, length, method) + adapter_flops(lm, boxed, length, rows, method)


def _lowest_group(lm, boxed, method):
    """The lowest group in which something learns: -1 if something below the layers does, or if they are scanned."""
    learns = [_group(path) for path, _, _ in leaves(boxed) if method.trains(path, lm)]
    return min(learns, default=-1)


def _group(path):
    """The group of a parameter of layers that are apart; -1 for the embeddings and for stacked layers, and what comes
    after the layers counts as the last."""
    name = path.split("/")[0]
    if name in ("norm", "head"):
        return math.inf
    return int(name.removeprefix("group_")) if name.startswith("group_") else -1


def state_bytes(lm, length):
    """Bytes of decode state that one row of `length` tokens holds in all layers."""
    of_group = [part.state_bytes(length) for block in parts(lm) for part in block if part is not None]
    return sum(of_group) * lm.num_groups


def decode_bytes(lm, boxed, params, rows, length):
    """Bytes that one step of decoding must read: the weights that `rows` tokens touch, and states of `length` tokens.

    `params` are the parameters in the form they have. Of E experts of which a token meets k, B tokens touch
    E (1 - (1 - k/E)^B) on average; of a table that is no head, B rows.
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))[0]
    sizes = {
        path_of(keys): sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(leaf)) for keys, leaf in flat
    }

    def touched(path, shape, axes):
        if path == "embedding" and not lm.tied:
            return min(1, rows / shape[0])
        return 1 - (1 - active_fraction(lm, path, axes)) ** rows

    weights = sum(sizes[path] * touched(path, shape, axes) for path, shape, axes in leaves(boxed))
    return weights + rows * state_bytes(lm, length)


def decode_flops(lm, boxed, length):
    """Forward FLOPs of the last token of a row of `length` tokens, those before it being in the state."""
    return forward_flops(lm, boxed, length) - forward_flops(lm, boxed, length - 1)


def _kernel_flops(lm, boxed, length):
    """`(path, forward FLOPs)` of each kernel for a row of `length` tokens."""
    for path, shape, axes in leaves(boxed):
        if path.endswith("kernel"):
            yield path, 2 * _rows(lm, path, length) * math.prod(shape) * active_fraction(lm, path, axes)


def _tied_head_flops(lm, length):
    return 2 * length * lm.dim * lm.vocab_size if lm.tied else 0


def leaves(boxed):
    """Yields `(path, shape, logical axes)` of each parameter; one that is in no box has none."""
    flat = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for keys, leaf in flat[0]:
        in_box = isinstance(leaf, nn.LogicallyPartitioned)
        yield path_of(keys), leaf.value.shape if in_box else leaf.shape, leaf.names if in_box else ()


def part_of(lm, path):
    """The mixer or ffn that a parameter belongs to; None for the model's own."""
    names = path.split("/")
    block = next((name for name in names if name.startswith("block_")), None)
    if block is None:
        return None
    mixer, ffn = parts(lm)[int(block.removeprefix("block_"))]
    return {"mixer": mixer, "ffn": ffn}.get(names[names.index(block) + 1])


def _rows(lm, path, length):
    """How many rows a kernel multiplies: one a token, unless its part says otherwise (`kernel_rows`)."""
    part = part_of(lm, path)
    return length if part is None else part.kernel_rows(path, length)


def active_fraction(lm, path, axes):
    """The share of a parameter that a token meets."""
    return part_of(lm, path).active_fraction if "expert" in axes else 1
