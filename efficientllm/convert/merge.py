"""Merges a PEFT adapter into a checkpoint."""

import pathlib

import numpy as np

from efficientllm.convert import adapter_folder
from efficientllm.convert.peft import unsupported
from efficientllm.convert.source import Source
from efficientllm.convert.write import SHARD, convert
from efficientllm.typing import PathLike


def merge_into(
    source: Source, folder: PathLike, out: PathLike, dtype: np.typing.DTypeLike | None = None, shard: int = SHARD
) -> None:
    """Writes the checkpoint `source`, with the adapter of a PEFT folder merged, to the new folder `out`.

    `dtype` None is the source's; the sum is computed in float32. Raises UserError before anything is written.
    """
    unsupported.table_of(source)
    adapted_source = adapter_folder.adapt_source(source, pathlib.Path(folder))
    convert(adapted_source, out, dtype or source.stored_dtype, shard)
