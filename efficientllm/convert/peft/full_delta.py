"""LoHa, LoKr and GLoRA, whose change is made whole, as folders that peft loads.

Ours lie as `[in, out]`, peft's as `[out, in]`: factors are transposed, and the first of a pair becomes the second.
Kernels in one tensor stand beside each other, as those of LoRA do (`write`): a row of both of LoHa's products is of the
same kernel, so that none mixes two.
"""

import numpy as np

from efficientllm.convert.peft.read import PREFIX
from efficientllm.runtime import distributed

PAIRS = {"LOHA": ("hada_w1_{}", "hada_w2_{}"), "GLORA": ("glora_A.X{}", "glora_B.X{}")}
SIDES = {"LOHA": ("a", "b"), "GLORA": ("d", "u")}


def peft_form(method, leaves, found):
    """`(tensors, config)` of the adapters `{our path: leaf}` of the modules `{module: OnDisk}`.

    All processes take part; None of all but the main one.
    """
    kind = method.peft.kind
    arrays = {
        path: {field: np.asarray(distributed.to_host(getattr(leaf, field)), np.float32) for field in method.learnt}
        for path, leaf in leaves.items()
    }
    if not distributed.is_main():
        return None
    ranks = {
        module: sum(_rank(arrays[path]) for path, *_ in tensor.parts if path in arrays)
        for module, tensor in found.items()
    }
    rank = max(ranks.values())
    tensors = {}
    for module, tensor in found.items():
        parts = _kronecker(tensor, arrays) if kind == "LOKR" else _pairs(kind, tensor, arrays, ranks, rank)
        tensors |= {f"{PREFIX}{module}.{name}": np.ascontiguousarray(value) for name, value in parts.items()}
    config = {"r": rank}
    if kind == "GLORA":
        config |= {"config_A_B": "lora", "config_C": "none", "config_D_E": "none", "bias": "none"}
    else:
        scale = next(iter(leaves.values())).scale
        others = {module: own for module, own in ranks.items() if own != rank}
        config |= {"alpha": round(scale * rank, 9), "rank_pattern": others}
        config["alpha_pattern"] = {module: round(scale * own, 9) for module, own in others.items()}
    return tensors, config


def _rank(arrays):
    return arrays["b" if "c" in arrays else "b1"].shape[-2]


def _pairs(kind, tensor, arrays, ranks, rank):
    """`{name: array}` of both low-rank products of a tensor. GLoRA's have one rank everywhere: the rest is zero."""
    found = {}
    for number, name in enumerate(PAIRS[kind], 1):
        first, blocks, start = [], [], 0
        held = sum(_rank(arrays[path]) for path, *_ in tensor.parts if path in arrays)
        for path, (_, width_out), position in tensor.parts:
            block = np.zeros((held, width_out), np.float32)
            if path in arrays:
                a, b = (arrays[path][f"{side}{number}"][position] for side in "ab")
                block[start : start + len(b)] = b
                start += len(b)
                first.append(a.T)
            blocks.append(block)
        out, into = tensor.join(blocks), np.concatenate(first)
        if held < rank and kind == "GLORA":
            out, into = np.pad(out, ((0, 0), (0, rank - held))), np.pad(into, ((0, rank - held), (0, 0)))
        for side, value in zip(SIDES[kind], (out, into), strict=True):
            found[name.format(side)] = value
    return found | (_no_biases(*tensor.shape) if kind == "GLORA" else {})


def _no_biases(width_out, width_in):
    """What peft holds of the paths that change a bias, where there is none."""
    shapes = {"C": (width_in, 1), "D": (width_out,), "E": (width_out,)}
    return {f"glora_{path}.zeros": np.zeros(shape, np.float32) for path, shape in shapes.items()}


def _kronecker(tensor, arrays):
    """`{name: array}`; peft makes the large factor whole where its rank would not be low."""
    ((path, _, position),) = tensor.parts
    c, a, b = (arrays[path][field][position] for field in ("c", "a", "b"))
    if len(b) < max(b.shape[1], len(a)) / 2:
        return {"lokr_w1": c.T, "lokr_w2_a": b.T, "lokr_w2_b": a.T}
    return {"lokr_w1": c.T, "lokr_w2": (a @ b).T}
