"""Memory-mapped numpy arrays, one mapping a tensor: only tensors in use take memory."""

import mmap
import os

import numpy as np


def map_array(
    file: str | os.PathLike[str], offset: int, dtype: np.typing.DTypeLike, shape: tuple[int, ...]
) -> np.ndarray:
    """Maps `shape` values of `dtype` at `offset`, read-only, until the last reference to the array is gone."""
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * np.dtype(dtype).itemsize
    with open(file, "rb") as opened:
        mapping = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapping, dtype, count, offset - start).reshape(shape)
