"""An adapter added to a checkpoint, one tensor at a time: `W + scale B A`, DoRA's magnitudes, PiSSA's frozen rest."""

import numpy as np

from efficientllm.adapters.folder import limits
from efficientllm.adapters.folder.opened import WEIGHT, Adapter
from efficientllm.convert import binding
from efficientllm.convert.write import SHARD, convert
from efficientllm.errors import UserError


def merge_into(source, folder, out, dtype=None, shard=SHARD):
    """Writes the checkpoint `source` with the adapter of a folder of peft's in its tensors to the new folder `out`.

    `dtype` is None for that of the source; sums are float32. Raises UserError before anything is written.
    """
    bound = binding.bind(source.lm(), limits.table_of(source))
    tensors = {
        name: tensor
        for name, tensor in binding.on_disk(bound).items()
        if all(path.endswith("kernel") for path, _, _ in tensor.parts)
    }
    adapter = Adapter(folder, tensors)

    def change(name, read):
        module = name.removesuffix(WEIGHT)
        return merged(adapter, module, read(np.float32)) if module in adapter.modules else read()

    convert(source, out, dtype, shard, change)


def merged(adapter, module, weight):
    """The module's weight `[out, in]` with its adapter, float32."""
    a, b, m, scale = adapter.factors(module)
    with np.errstate(all="ignore"):  # what comes of it is looked at as a whole
        new = adapter.base(module, weight) + scale * (b @ a)
        new = new if m is None else new * (m / np.linalg.norm(new, axis=1))[:, None]
    if not np.isfinite(new).all() and np.isfinite(weight).all():
        raise UserError(f"{adapter.file}: the adapter of {module} makes NaN or infinity of its weight")
    return new
