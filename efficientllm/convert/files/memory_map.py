"""Bytes of a file as numpy arrays, mapped one tensor at a time: what is not read is not in memory, nor is what was."""

import mmap

import numpy as np


def map_array(file, offset, dtype, shape):
    """`shape` values of `dtype` from `offset` on, read-only. The mapping ends with the last reference to the array."""
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * np.dtype(dtype).itemsize
    with open(file, "rb") as opened:
        mapping = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapping, dtype, count, offset - start).reshape(shape)
