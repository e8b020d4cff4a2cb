"""Merges an adapter into one weight, or its bias: LoRA, DoRA, PiSSA, and the kinds of `adapter_kinds`."""

import numpy as np

from efficientllm.convert.peft.read import Adapter
from efficientllm.errors import UserError


def merge_adapter(adapter: Adapter, module: str, weight: np.ndarray) -> np.ndarray:
    """Merges the adapter of a module into its weight `[out, in]`, in float32. Raises UserError for NaN or infinity."""
    with np.errstate(all="ignore"):  # the result is checked
        new = _lora(adapter, module, weight) if adapter.config.kind == "LORA" else adapter.changed(module, weight)
    return _finite(new, weight, f"{adapter.file}: the adapter of {module} makes NaN or infinity of its weight")


def merge_into_bias(adapter: Adapter, module: str, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Merges a GLoRA of a module into its bias `[out]`, in float32; `weight` is the module's own.

    Raises UserError for NaN or infinity.
    """
    with np.errstate(all="ignore"):
        new = adapter.changed_bias(module, weight, np.asarray(bias, np.float32))
    return _finite(new, weight, f"{adapter.file}: the adapter of {module} makes NaN or infinity of its bias")


def _finite(new, before, message):
    if not np.isfinite(new).all() and np.isfinite(before).all():
        raise UserError(message)
    return new


def _lora(adapter, module, weight):
    a, b, m, scale = adapter.factors(module)
    new = adapter.base(module, weight) + scale * (b @ a)
    return new if m is None else new * (m / np.linalg.norm(new, axis=1))[:, None]
