"""An adapter added to one tensor: `W + scale B A`, DoRA's magnitudes, PiSSA's frozen rest, and what the kinds of
`adapter_kinds` make of it."""

import numpy as np

from efficientllm.errors import UserError


def merged(adapter, module, weight):
    """The module's weight `[out, in]` with its adapter, float32."""
    with np.errstate(all="ignore"):  # what comes of it is looked at as a whole
        new = _lora(adapter, module, weight) if adapter.config.kind == "LORA" else adapter.changed(module, weight)
    if not np.isfinite(new).all() and np.isfinite(weight).all():
        raise UserError(f"{adapter.file}: the adapter of {module} makes NaN or infinity of its weight")
    return new


def _lora(adapter, module, weight):
    a, b, m, scale = adapter.factors(module)
    new = adapter.base(module, weight) + scale * (b @ a)
    return new if m is None else new * (m / np.linalg.norm(new, axis=1))[:, None]
