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
SHIFT = "shift"  # the key of a GLoRA's E + W C


def peft_form(
    method: typing.Any, leaves: dict[str, typing.Any], modules: dict[str, DiskTensor]
) -> tuple[dict[str, np.ndarray], dict[str, typing.Any]] | None:
    """Converts the adapters `{our path: leaf}` of `{module: DiskTensor}` to `(tensors, config)`.

    Collective: every process calls it; it returns None on all but the main one.
    """
    kind = method.peft.kind
    arrays = {path: _arrays(leaf, method.learnt) for path, leaf in leaves.items()}
    # A fused tensor has one C for all of its kernels. E of one number an output holds what is added to the bias.
    fused = [path for tensor in modules.values() if len(tensor.parts) > 1 for path, *_ in tensor.parts]
    as_vectors = any("d" in arrays.get(path, {}) for path in fused)
    if as_vectors:
        for path in arrays.keys() & {path for path in leaves if "d" in arrays[path]}:
            leaf = leaves[path]
            arrays[path][SHIFT] = _on_host(leaf.adapted_bias(np.zeros((*leaf.shape[:-2], leaf.shape[-1]), np.float32)))
    if not distributed.is_main():
        return None
    ranks = {
        module: method.rank * sum(path in arrays for path, *_ in tensor.parts) for module, tensor in modules.items()
    }
    rank = max(ranks.values())
    tensors: dict[str, np.ndarray] = {}
    for module, tensor in modules.items():
        factors = _kronecker(tensor, arrays) if kind == "LOKR" else _pairs(kind, tensor, arrays, ranks[module], rank)
        if kind == "GLORA":
            factors |= _biases(tensor, arrays, rank, as_vectors)
        tensors |= {f"{PREFIX}{module}.{name}": np.ascontiguousarray(value) for name, value in factors.items()}
    config = {"r": rank}
    if kind == "GLORA":
        config |= {"config_A_B": "lora", **_bias_config(arrays, as_vectors), "bias": "none"}
    else:
        scale = next(iter(leaves.values())).scale
        other_ranks = {module: module_rank for module, module_rank in ranks.items() if module_rank != rank}
        config |= {"alpha": round(scale * rank, 9), "rank_pattern": other_ranks}
        config["alpha_pattern"] = {module: round(scale * module_rank, 9) for module, module_rank in other_ranks.items()}
    return tensors, config


def _arrays(leaf, learnt):
    """The trainable arrays that a leaf has, on the host."""
    values = {field: getattr(leaf, field) for field in learnt}
    return {field: _on_host(value) for field, value in values.items() if value is not None}


def _on_host(array):
    return np.asarray(distributed.to_host(array), np.float32)


def _pairs(kind, tensor, arrays, module_rank, rank):
    """`{name: array}` of both low-rank products of a tensor; GLoRA's are zero-padded to the common rank."""
    tensors = {}
    for number, name in enumerate(PAIRS[kind], 1):
        first, blocks, start = [], [], 0
        for path, (_, width_out), position in tensor.parts:
            block = np.zeros((module_rank, width_out), np.float32)
            if path in arrays:
                a, b = (arrays[path][f"{side}{number}"][position] for side in "ab")
                block[start : start + len(b)] = b
                start += len(b)
                first.append(a.T)
            blocks.append(block)
        out, into = tensor.join(blocks), np.concatenate(first)
        if kind == "GLORA":
            out, into = _padded(out, into, rank)
        for side, value in zip(SIDES[kind], (out, into), strict=True):
            tensors[name.format(side)] = value
    return tensors


def _padded(down, up, rank):
    """A product `[out, r] [r, in]` with zeros up to the common rank, which a GLoRA folder has one of."""
    rest = rank - len(up)
    return np.pad(down, ((0, 0), (0, rest))), np.pad(up, ((0, rest), (0, 0)))


def _bias_config(arrays, as_vectors):
    if as_vectors:
        return {"config_C": "none", "config_D_E": "vector"}
    has_biases = any("d" in factors for factors in arrays.values())
    return {"config_C": "lora", "config_D_E": "constant"} if has_biases else {"config_C": "none", "config_D_E": "none"}


def _biases(tensor, arrays, rank, as_vectors):
    """`{name: array}` of the paths of GLoRA that change a bias; zeros where the layer has none."""
    width_out, width_in = tensor.shape
    zeros = {"C": (width_in, 1), "D": (width_out,), "E": (width_out,)}
    no_bias = {f"glora_{path}.zeros": np.zeros(shape, np.float32) for path, shape in zeros.items()}
    if not any("d" in arrays.get(path, {}) for path, *_ in tensor.parts):
        return no_bias
    if as_vectors:
        return {
            "glora_C.zeros": no_bias["glora_C.zeros"],
            "glora_D.X": _vector(tensor, arrays, "d"),
            "glora_E.X": _vector(tensor, arrays, SHIFT),
        }
    ((path, _, position),) = tensor.parts
    factors = {name: arrays[path][name][position] for name in ("c_a", "c_b", "d", "e")}
    down, up = _padded(factors["c_a"], factors["c_b"], rank)
    return {"glora_C.Xd": down, "glora_C.Xu": up, "glora_D.X": factors["d"], "glora_E.X": factors["e"]}


def _vector(tensor, arrays, name):
    """One number for each output of a tensor, 0 for those of kernels without adapter."""
    vectors = [np.zeros(width_out, np.float32) for _, (_, width_out), _ in tensor.parts]
    for vector, (path, _, position) in zip(vectors, tensor.parts, strict=True):
        if path in arrays:
            vector[:] = arrays[path][name][position]
    return tensor.join(vectors)


def _kronecker(tensor, arrays):
    """`{name: array}` of LoKr's factors."""
    ((path, _, position),) = tensor.parts
    factors = {name: array[position].T for name, array in arrays[path].items()}
    names = {"c": "lokr_w1", "a": "lokr_w2_b", "b": "lokr_w2_a", "block": "lokr_w2"}
    return {names[name]: array for name, array in factors.items()}
