"""An adapter added to a checkpoint, one tensor at a time: `W + scale B A`, DoRA's magnitudes, PiSSA's frozen rest, and
what other kinds (`kinds`) make of it."""

import pathlib

import numpy as np

from efficientllm.convert import adapter_folder
from efficientllm.convert.peft import unsupported
from efficientllm.convert.write import SHARD, convert
from efficientllm.errors import UserError


def merge_into(source, folder, out, dtype=None, shard=SHARD):
    """Writes the checkpoint `source` with the adapter of a folder of peft's in its tensors to the new folder `out`.

    `dtype` is None for that of the source; sums are float32. Raises UserError before anything is written.
    """
    unsupported.table_of(source)
    adapted_source = adapter_folder.put_around(source, pathlib.Path(folder))
    convert(adapted_source, out, dtype or source.stored_dtype, shard)


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
