"""LoHa, LoKr and GLoRA merged into a weight `[out, in]`, and the tensor names of every kind of PEFT adapter.

Shapes are peft's, `[out, in]`: LoRA's A is `[R, in]` and B `[out, R]`, those of an embedding `[V, D]` are `[R, V]` and
`[D, R]`. LoHa has two such pairs, LoKr a small factor and one that may be low-rank, GLoRA a scale and a shift.
"""

import numpy as np

PARTS = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "GLORA": tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")),
}


def add_adapter(kind: str, weight: np.ndarray, parts: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Adds the LoHa, LoKr or GLoRA `{part: array}` to a weight.

    Raises ValueError for shapes that do not fit, and for a part that also changes the bias.
    """
    if kind == "LOHA":
        first, second = (_product(parts, f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
        return weight + scale * (_sized(first, weight) * _sized(second, weight))
    if kind == "LOKR":
        small, large = (_one_or_product(parts, f"lokr_w{i}") for i in (1, 2))
        return weight + scale * _sized(np.kron(small, large), weight)
    for path in "CDE":
        if any(np.any(array) for name, array in parts.items() if name.startswith(f"glora_{path}.")):
            raise ValueError(f"glora_{path} changes a bias, which is not read; config_C = config_D_E = 'none' are")
    return weight + weight * _path(parts, "A", weight) + _path(parts, "B", weight)


def _path(parts, path, weight):
    """One of GLoRA's paths: a low-rank matrix, one number per output, a scalar, or zero."""
    if f"glora_{path}.X" in parts:
        single = parts[f"glora_{path}.X"]
        if single.shape not in ((1,), (weight.shape[0], 1)):
            raise ValueError(f"glora_{path}.X of shape {list(single.shape)} around {list(weight.shape)}")
        return single
    if f"glora_{path}.Xd" not in parts and f"glora_{path}.Xu" not in parts:
        return np.zeros(1, np.float32)
    return _sized(_product(parts, f"glora_{path}.Xd", f"glora_{path}.Xu"), weight)


def _one_or_product(parts, name):
    return parts[name] if name in parts else _product(parts, f"{name}_a", f"{name}_b")


def _product(parts, a, b):
    for name in (a, b):
        if name not in parts:
            raise ValueError(f"{name} is missing")
    if parts[a].ndim != 2 or parts[b].ndim != 2 or parts[a].shape[1] != parts[b].shape[0]:
        raise ValueError(f"{a} {list(parts[a].shape)} and {b} {list(parts[b].shape)} do not fit each other")
    return parts[a] @ parts[b]


def _sized(matrix, weight):
    if matrix.shape != weight.shape:
        raise ValueError(f"it is of shape {list(matrix.shape)}, the weight of {list(weight.shape)}")
    return matrix
