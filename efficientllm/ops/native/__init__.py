"""Decoding in C++, products of a few rows with compressed weights and attention over a state: on CPUs XLA runs these
far below the memory's bandwidth.

`setup.py` builds them where a compiler is found. Without them everything runs, through XLA, at a fraction of the speed.
"""

import ctypes
import functools
import logging
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import sharding
from efficientllm.runtime import kernel_choice

log = logging.getLogger("efficientllm")
TARGETS = ("efficientllm_products", "efficientllm_attention")
FORMATS = ("int4", "int8", "nf4", "bfloat16", "float16")  # the order of product.h


@functools.cache
def instruction_sets():
    """The instruction sets the library can use on this machine, best last; empty where there is no library."""
    library = _library()
    return () if library is None else tuple(library.efficientllm_instruction_sets().decode().split())


def is_usable():
    """Whether what is traced here may call the library: it is there, and the program is for one CPU device."""
    return sharding.is_alone() and kernel_choice.platform() == "cpu" and bool(instruction_sets())


class Rows(typing.NamedTuple):
    """Compressed rows, `weights[R, bytes]`, stored as `product.h` says for `form`; some round x to `x_bits`."""

    form: str
    weights: jax.Array
    scale: jax.Array | None = None
    minimum: jax.Array | None = None
    zero: jax.Array | None = None
    table: jax.Array | None = None
    x_bits: int = 16

    @property
    def layout(self):
        """What rows that multiply in one call have in common."""
        return self.form, self.x_bits, self.weights.shape[1:], self.scale is not None and self.scale.shape[1:]


def products(x_MK, rows, instructions="best"):
    """`x[m, k]` times each of `rows`, Rows of one layout -> float32 `[m, R]` of each.

    Needs `instruction_sets()`. On one CPU device, in jitted code or out of it.
    """
    _library()

    def given(array, dtype):
        return jnp.zeros((0, 0), dtype) if array is None else array

    shapes = [jax.ShapeDtypeStruct((x_MK.shape[0], each.weights.shape[0]), jnp.float32) for each in rows]
    call = jax.ffi.ffi_call(TARGETS[0], shapes, vmap_method="sequential")
    arrays = []
    for _, weights, scale, minimum, zero, *_ in rows:
        arrays += weights, given(scale, jnp.float32), given(minimum, jnp.float16), given(zero, jnp.uint8)
    table = jnp.zeros(0, jnp.float32) if rows[0].table is None else rows[0].table
    attributes = {"format": np.int32(FORMATS.index(rows[0].form)), "x_bits": np.int32(rows[0].x_bits)}
    return call(x_MK.astype(jnp.float32), table, *arrays, **attributes, instructions=instructions)


def attention(q_BHK, keys, v_BSGV, mask_BS, scale, scales=None, instructions="best"):
    """Softmax attention of one query a row over the slots that `mask_BS` allows -> float32 `[B, H, V]`.

    `keys` are one or two arrays `[B, S, G, ...]` that lie side by side along the last axis of the queries. They and the
    values are float32, bfloat16, float16, or int8 with float32 `scales` `[B, S, G]`, of each array of keys and of the
    values. Query head h reads KV head h // (H // G). A row that is allowed nothing gets zeros. Needs `is_usable()`.
    """
    _library()
    shape = jax.ShapeDtypeStruct((*q_BHK.shape[:2], v_BSGV.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(TARGETS[1], shape, vmap_method="sequential")
    if len(keys) == 1:
        keys = (*keys, jnp.zeros((*keys[0].shape[:3], 0), keys[0].dtype))
        scales = scales and (scales[0], jnp.zeros_like(scales[0]), scales[1])
    scales = scales or (jnp.zeros((0, 0, 0)),) * 3
    operands = (q_BHK.astype(jnp.float32), *keys, v_BSGV, *scales, mask_BS)
    return call(*operands, scale=np.float32(scale), instructions=instructions)


@functools.cache
def _library():
    found = sorted(pathlib.Path(__file__).parent.glob("_products*.so"))
    if not found:
        log.warning("no native products (setup.py found no compiler): compressed weights run through XLA, slower")
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        capsules = {target: jax.ffi.pycapsule(getattr(library, target)) for target in TARGETS}
    except (OSError, AttributeError) as error:  # one that was built from older sources lacks a function
        log.warning("native products cannot be loaded (%s): compressed weights run through XLA, slower", error)
        return None
    library.efficientllm_instruction_sets.restype = ctypes.c_char_p
    for target, capsule in capsules.items():
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return library


def fits(group_bytes, groups):
    """Whether there is a product for rows of `groups` groups of `group_bytes`."""
    return group_bytes % 4 == 0 and (groups == 1 or (group_bytes >= 16 and group_bytes & (group_bytes - 1) == 0))
