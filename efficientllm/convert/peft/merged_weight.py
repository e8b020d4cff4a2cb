"""Merges an adapter into one weight: LoRA, DoRA, PiSSA, and the kinds of `adapter_kinds`."""

import numpy as np

from efficientllm.convert.peft.read import Adapter
from efficientllm.errors import UserError


def merge_adapter(adapter: Adapter, module: str, weight: np.ndarray) -> np.ndarray:
    """Merges the adapter of a module into its weight `[out, in]`, in float32. Raises UserError for NaN or infinity."""
    with np.errstate(all="ignore"):  # the result is checked below
        new = _lora(adapter, module, weight) if adapter.config.kind == "LORA" else adapter.changed(module, weight)
    if not np.isfinite(new).all() and np.isfinite(weight).all():
        raise UserError(f"{adapter.file}: the adapter of {module} makes NaN or infinity of its weight")
    return new


def _lora(adapter, module, weight):
    a, b, m, scale = adapter.factors(module)
    new = adapter.base(module, weight) + scale * (b @ a)
    return new if m is None else new * (m / np.linalg.norm(new, axis=1))[:, None]
