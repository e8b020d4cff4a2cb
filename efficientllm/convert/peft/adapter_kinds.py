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


def add_adapter(kind: str, weight: np.ndarray, arrays: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Adds the LoHa, LoKr or GLoRA `{part: array}` to a weight. Raises ValueError for shapes that do not fit."""
    if kind == "LOHA":
        first, second = (_product(arrays, f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
        return weight + scale * (_sized(first, weight) * _sized(second, weight))
    if kind == "LOKR":
        small, large = (_one_or_product(arrays, f"lokr_w{i}") for i in (1, 2))
        return weight + scale * _sized(np.kron(small, large), weight)
    return weight + weight * _path(arrays, "A", weight) + _path(arrays, "B", weight)


def add_to_bias(bias: np.ndarray, weight: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Adds the GLoRA `{part: array}` around a weight to the bias of its layer. Raises ValueError as `add_adapter`."""
    scale, shift = (_vector(arrays, path, bias) for path in "DE")
    if any(f"glora_C.{part}" in arrays for part in ("Xd", "Xu")):
        column = _product(arrays, "glora_C.Xd", "glora_C.Xu")
    else:
        column = arrays.get("glora_C.X", np.zeros((weight.shape[1], 1), np.float32))
    if column.shape != (weight.shape[1], 1):
        raise ValueError(f"glora_C of shape {list(column.shape)} around {list(weight.shape)}")
    return bias + bias * scale + shift + (weight @ column)[:, 0]


def changes_bias(arrays: dict[str, np.ndarray]) -> bool:
    """Whether the `{part: array}` of an adapter changes the bias of its layer."""
    return any(np.any(values) for name, values in arrays.items() if name.startswith(("glora_C", "glora_D", "glora_E")))


def _vector(arrays, path, bias):
    """GLoRA's D or E: a scalar, one number for each output, or zero."""
    values = arrays.get(f"glora_{path}.X", np.zeros(1, np.float32))
    if values.shape not in ((1,), bias.shape):
        raise ValueError(f"glora_{path}.X of shape {list(values.shape)} for a bias of {list(bias.shape)}")
    return values


def _path(arrays, path, weight):
    """One of GLoRA's paths: a low-rank matrix, one number per output, a scalar, or zero."""
    if f"glora_{path}.X" in arrays:
        single = arrays[f"glora_{path}.X"]
        if single.shape not in ((1,), (weight.shape[0], 1)):
            raise ValueError(f"glora_{path}.X of shape {list(single.shape)} around {list(weight.shape)}")
        return single
    if f"glora_{path}.Xd" not in arrays and f"glora_{path}.Xu" not in arrays:
        return np.zeros(1, np.float32)
    return _sized(_product(arrays, f"glora_{path}.Xd", f"glora_{path}.Xu"), weight)


def _one_or_product(arrays, name):
    return arrays[name] if name in arrays else _product(arrays, f"{name}_a", f"{name}_b")


def _product(arrays, a, b):
    for name in (a, b):
        if name not in arrays:
            raise ValueError(f"{name} is missing")
    if arrays[a].ndim != 2 or arrays[b].ndim != 2 or arrays[a].shape[1] != arrays[b].shape[0]:
        raise ValueError(f"{a} {list(arrays[a].shape)} and {b} {list(arrays[b].shape)} do not fit each other")
    return arrays[a] @ arrays[b]


def _sized(matrix, weight):
    if matrix.shape != weight.shape:
        raise ValueError(f"it is of shape {list(matrix.shape)}, the weight of {list(weight.shape)}")
    return matrix
