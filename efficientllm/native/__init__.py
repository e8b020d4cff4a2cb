"""Products of a few rows with compressed weights, in C++: on CPUs XLA runs these far below the memory's bandwidth.

`setup.py` builds them where a compiler is found. Without them everything runs, through XLA, at a fraction of the speed.
"""

import ctypes
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger("efficientllm")
TARGET = "efficientllm_product"
FORMATS = ("int4", "int8", "nf4", "bfloat16", "float16")  # the order of product.h


@functools.cache
def instruction_sets():
    """The instruction sets the library can use on this machine, best last; empty where there is no library."""
    library = _library()
    return () if library is None else tuple(library.efficientllm_instruction_sets().decode().split())


def product(form, x_MK, weights, scale=None, minimum=None, zero=None, table=None, x_bits=16, instructions="best"):
    """`x[m, k]` times rows of `weights`, stored as `product.h` says for `form` -> float32 `[m, rows]`.

    Needs `instruction_sets()`. On one CPU device, in jitted code or out of it.
    """

    _library()

    def given(array, dtype):
        return jnp.zeros((0, 0), dtype) if array is None else array

    call = jax.ffi.ffi_call(
        TARGET, jax.ShapeDtypeStruct((x_MK.shape[0], weights.shape[0]), jnp.float32), vmap_method="sequential"
    )
    arrays = (weights, given(scale, jnp.float32), given(minimum, jnp.float16), given(zero, jnp.uint8))
    table = jnp.zeros(0, jnp.float32) if table is None else table
    attributes = {"format": np.int32(FORMATS.index(form)), "x_bits": np.int32(x_bits), "instructions": instructions}
    return call(x_MK.astype(jnp.float32), *arrays, table, **attributes)


@functools.cache
def _library():
    found = sorted(pathlib.Path(__file__).parent.glob("_products*.so"))
    if not found:
        log.warning("no native products (setup.py found no compiler): compressed weights run through XLA, slower")
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        log.warning("native products cannot be loaded (%s): compressed weights run through XLA, slower", error)
        return None
    library.efficientllm_instruction_sets.restype = ctypes.c_char_p
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.efficientllm_product), platform="cpu")
    return library


def fits(group_bytes, groups):
    """Whether there is a product for rows of `groups` groups of `group_bytes`."""
    return group_bytes % 4 == 0 and (groups == 1 or (group_bytes >= 16 and group_bytes & (group_bytes - 1) == 0))
