"""Native C++ kernels for decoding on CPUs: products of few rows with packed weights, and attention over a KV cache.

XLA runs these far below memory bandwidth. `setup.py` builds the library where it finds a compiler. Without the library
everything runs through XLA, at a fraction of the speed.
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
TARGETS = ("efficientllm_products", "efficientllm_attention", "efficientllm_head_products")
FORMATS = ("int4", "int8", "nf4", "bfloat16", "float16")  # the order of product.h


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Lists the instruction sets that the library supports on this machine, best last; empty without a library."""
    library = _library()
    return () if library is None else tuple(library.efficientllm_instruction_sets().decode().split())


def is_usable() -> bool:
    """Tells whether the traced program may call the library: it is built, and the program runs on one CPU device."""
    return sharding.is_alone() and kernel_choice.platform() == "cpu" and bool(instruction_sets())


class Rows(typing.NamedTuple):
    """Packed rows of weights `[R, bytes]` in a format of `product.h`; int4 rounds x to `x_bits`."""

    form: str
    weights: jax.Array
    scale: jax.Array | None = None
    minimum: jax.Array | None = None
    zero: jax.Array | None = None
    table: jax.Array | None = None
    x_bits: int = 16

    @property
    def layout(self) -> tuple:
        """The layout that all rows of one call share."""
        return self.form, self.x_bits, self.weights.shape[1:], self.scale is not None and self.scale.shape[1:]


def products(x_MK: jax.Array, rows: list[Rows], instructions: str = "best") -> list[jax.Array]:
    """Multiplies `x[m, k]` with each of `rows`, which share a layout -> a list of float32 `[m, R]`.

    Needs `instruction_sets()`. Runs on one CPU device, inside or outside jitted code.
    """
    _library()

    def operand(array, dtype):
        return jnp.zeros((0, 0), dtype) if array is None else array

    shapes = [jax.ShapeDtypeStruct((x_MK.shape[0], leaf.weights.shape[0]), jnp.float32) for leaf in rows]
    call = jax.ffi.ffi_call(TARGETS[0], shapes, vmap_method="sequential")
    arrays: list[jax.Array] = []
    for _, weights, scale, minimum, zero, *_ in rows:
        arrays += weights, operand(scale, jnp.float32), operand(minimum, jnp.float16), operand(zero, jnp.uint8)
    table = jnp.zeros(0, jnp.float32) if rows[0].table is None else rows[0].table
    attributes = {"format": np.int32(FORMATS.index(rows[0].form)), "x_bits": np.int32(rows[0].x_bits)}
    return call(x_MK.astype(jnp.float32), table, *arrays, **attributes, instructions=instructions)


def attention(
    q_BHK: jax.Array,
    keys: typing.Sequence[jax.Array],
    v_BSGV: jax.Array,
    mask_BS: jax.Array,
    scale: float,
    scales: typing.Sequence[jax.Array] | None = None,
    instructions: str = "best",
) -> jax.Array:
    """Computes softmax attention of one query a row over the slots that `mask_BS` allows -> float32 `[B, H, V]`.

    `keys` are one or two arrays `[B, S, G, ...]`; two are the first and last channels of the keys. Keys and values of
    one KV head may be `[B, S, ...]`: a reshape would make XLA copy a cache that it has just written. They are float32,
    bfloat16, float16, or int8. Int8 has float32 `scales` `[B, S, G]`, one for each array of keys and one for the
    values. Query head h reads KV head h // (H // G). A row whose slots are all masked gets zeros. Needs
    `is_usable()`.
    """
    _library()
    shape = jax.ShapeDtypeStruct((*q_BHK.shape[:2], v_BSGV.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(TARGETS[1], shape, vmap_method="sequential")
    if len(keys) == 1:
        keys = (*keys, jnp.zeros((*keys[0].shape[:-1], 0), keys[0].dtype))
        scales = scales and (scales[0], jnp.zeros_like(scales[0]), scales[1])
    scales = scales or (jnp.zeros((0, 0, 0)),) * 3
    operands = (q_BHK.astype(jnp.float32), *keys, v_BSGV, *scales, mask_BS)
    return call(*operands, scale=np.float32(scale), instructions=instructions)


def head_products(
    x_BHj: jax.Array,
    weights: jax.Array,
    part: slice,
    width: int,
    over_rank: bool,
    heads_in_rows: bool = False,
    instructions: str = "best",
) -> jax.Array:
    """Multiplies a vector of each head with that head's part of one kernel -> float32 `[B, H, i]`.

    Args:
      weights: `[R, H width]`, or with `heads_in_rows` `[H width, R]`; float32, bfloat16 or float16.
      part: the columns of each head in use, of its `width`.
      over_rank: sums over R, into columns `i`; otherwise over the columns `j`, into R.

    XLA for CPUs copies the part transposed for each call. Needs `is_usable()`.
    """
    _library()
    rank = weights.shape[1 if heads_in_rows else 0]
    outputs = part.stop - part.start if over_rank else rank
    shape = jax.ShapeDtypeStruct((*x_BHj.shape[:2], outputs), jnp.float32)
    call = jax.ffi.ffi_call(TARGETS[2], shape, vmap_method="sequential")
    numbers = {"width": width, "offset": part.start, "heads_in_rows": heads_in_rows, "over_rank": over_rank}
    attributes = {name: np.int32(number) for name, number in numbers.items()}
    return call(x_BHj.astype(jnp.float32), weights, **attributes, instructions=instructions)


@functools.cache
def _library():
    libraries = sorted(pathlib.Path(__file__).parent.glob("_products*.so"))
    if not libraries:
        log.warning("no native products (setup.py found no compiler): packed weights run through XLA, slower")
        return None
    try:
        library = ctypes.CDLL(str(libraries[0]))
        capsules = {target: jax.ffi.pycapsule(getattr(library, target)) for target in TARGETS}
    except (OSError, AttributeError) as error:  # one that was built from older sources lacks a function
        log.warning("native products cannot be loaded (%s): packed weights run through XLA, slower", error)
        return None
    library.efficientllm_instruction_sets.restype = ctypes.c_char_p
    for target, capsule in capsules.items():
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return library


def fits(group_bytes: int, groups: int) -> bool:
    """Tells whether the library multiplies rows of `groups` groups of `group_bytes` each."""
    return group_bytes % 4 == 0 and (groups == 1 or (group_bytes >= 16 and group_bytes & (group_bytes - 1) == 0))
