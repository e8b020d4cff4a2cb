"""A checkpoint written with an adapter added to its tensors."""

import pathlib

from efficientllm.convert import adapter_folder
from efficientllm.convert.peft import unsupported
from efficientllm.convert.write import SHARD, convert


def merge_into(source, folder, out, dtype=None, shard=SHARD):
    """Writes the checkpoint `source` with the adapter of a folder of peft's in its tensors to the new folder `out`.

    `dtype` is None for that of the source; sums are float32. Raises UserError before anything is written.
    """
    unsupported.table_of(source)
    adapted_source = adapter_folder.adapt_source(source, pathlib.Path(folder))
    convert(adapted_source, out, dtype or source.stored_dtype, shard)
