"""LoHa, LoKr and GLoRA adapters in PEFT's tensors.

Our kernels are `[in, out]`, PEFT's `[out, in]`: factors are transposed, and the first of a pair becomes the second.
Kernels fused in one tensor get block-diagonal factors, as with LoRA (`write`): a row of both of LoHa's products belongs
to the same kernel, so that no product mixes two kernels.
"""

import typing

import numpy as np

from efficientllm.convert.peft.read import PREFIX
from efficientllm.convert.tensors.parameter_map import DiskTensor
from efficientllm.runtime import distributed

PAIRS = {"LOHA": ("hada_w1_{}", "hada_w2_{}"), "GLORA": ("glora_A.X{}", "glora_B.X{}")}
SIDES = {"LOHA": ("a", "b"), "GLORA": ("d", "u")}


def peft_form(
    method: typing.Any, leaves: dict[str, typing.Any], modules: dict[str, DiskTensor]
) -> tuple[dict[str, np.ndarray], dict[str, typing.Any]] | None:
    """Converts the adapters `{our path: leaf}` of `{module: DiskTensor}` to `(tensors, config)`.

    Collective: every process calls it; it returns None on all but the main one.
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
        for module, tensor in modules.items()
    }
    rank = max(ranks.values())
    tensors: dict[str, np.ndarray] = {}
    for module, tensor in modules.items():
        parts = _kronecker(tensor, arrays) if kind == "LOKR" else _pairs(kind, tensor, arrays, ranks, rank)
        tensors |= {f"{PREFIX}{module}.{name}": np.ascontiguousarray(value) for name, value in parts.items()}
    config = {"r": rank}
    if kind == "GLORA":
        config |= {"config_A_B": "lora", "config_C": "none", "config_D_E": "none", "bias": "none"}
    else:
        scale = next(iter(leaves.values())).scale
        other_ranks = {module: module_rank for module, module_rank in ranks.items() if module_rank != rank}
        config |= {"alpha": round(scale * rank, 9), "rank_pattern": other_ranks}
        config["alpha_pattern"] = {module: round(scale * module_rank, 9) for module, module_rank in other_ranks.items()}
    return tensors, config


def _rank(arrays):
    return arrays["b" if "c" in arrays else "b1"].shape[-2]


def _pairs(kind, tensor, arrays, ranks, rank):
    """`{name: array}` of both low-rank products of a tensor; GLoRA's are zero-padded to the common rank."""
    tensors = {}
    for number, name in enumerate(PAIRS[kind], 1):
        first, blocks, start = [], [], 0
        module_rank = sum(_rank(arrays[path]) for path, *_ in tensor.parts if path in arrays)
        for path, (_, width_out), position in tensor.parts:
            block = np.zeros((module_rank, width_out), np.float32)
            if path in arrays:
                a, b = (arrays[path][f"{side}{number}"][position] for side in "ab")
                block[start : start + len(b)] = b
                start += len(b)
                first.append(a.T)
            blocks.append(block)
        out, into = tensor.join(blocks), np.concatenate(first)
        if module_rank < rank and kind == "GLORA":
            out, into = np.pad(out, ((0, 0), (0, rank - module_rank))), np.pad(into, ((0, rank - module_rank), (0, 0)))
        for side, value in zip(SIDES[kind], (out, into), strict=True):
            tensors[name.format(side)] = value
    return tensors | (_no_biases(*tensor.shape) if kind == "GLORA" else {})


def _no_biases(width_out, width_in):
    """Zeros for the paths of GLoRA that change a bias."""
    shapes = {"C": (width_in, 1), "D": (width_out,), "E": (width_out,)}
    return {f"glora_{path}.zeros": np.zeros(shape, np.float32) for path, shape in shapes.items()}


def _kronecker(tensor, arrays):
    """`{name: array}` of LoKr's factors; PEFT stores the large factor unfactored where its rank is not low."""
    ((path, _, position),) = tensor.parts
    c, a, b = (arrays[path][field][position] for field in ("c", "a", "b"))
    if len(b) < max(b.shape[1], len(a)) / 2:
        return {"lokr_w1": c.T, "lokr_w2_a": b.T, "lokr_w2_b": a.T}
    return {"lokr_w1": c.T, "lokr_w2": (a @ b).T}
