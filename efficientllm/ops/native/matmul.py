"""Native matrix products of many rows on CPUs: float32 with AVX-512, bfloat16 operands with AVX-512 BF16 or AMX.

XLA's own products round and transpose operands in passes of their own, and with jax 0.10.2 a transposed operand in
bfloat16 is multiplied in float32: the gradients of kernels took 8.5 of 26 ms of a layer, and take 2.6.
"""

import ctypes
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.runtime import cpuinfo, kernel_choice

log = logging.getLogger("efficientllm")
TARGET = "efficientllm_matmul"
ATTENTION = ("efficientllm_flash", "efficientllm_flash_gradients")  # of flash.py, in the same library


def instruction_sets(product: jnp.dtype) -> tuple[str, ...]:
    """Lists the instruction sets with kernels for operands of this dtype on this machine, best last.

    It is empty without the library, and for dtypes other than float32 and bfloat16. `--xla_cpu_max_isa` in XLA_FLAGS
    limits these kernels as it limits XLA.
    """
    library, product = _library(), jnp.dtype(product)
    if library is None or product not in (jnp.float32, jnp.bfloat16):
        return ()
    names = library.efficientllm_matmul_instruction_sets(product == jnp.bfloat16).decode().split()
    return tuple(name for name in names if cpuinfo.is_allowed(name.upper()))


def is_built() -> bool:
    """Tells whether the library is there and can be loaded."""
    return _library() is not None


def is_usable(product: jnp.dtype) -> bool:
    """Tells whether the traced program may multiply natively: it runs on one CPU device that has the instructions."""
    return sharding.is_alone() and kernel_choice.platform() == "cpu" and bool(instruction_sets(product))


def matmul(
    a: jax.Array,
    b: jax.Array,
    product: jnp.dtype,
    out_dtype: jnp.dtype,
    transpose_a: bool = False,
    transpose_b: bool = False,
    instructions: str = "best",
) -> jax.Array:
    """Computes `a[m, k] @ b[k, n]` -> `[m, n]`; transposed operands are given as `[k, m]` and `[n, k]`.

    Operands and result are float32 or bfloat16. Operands are rounded to `product`, and sums are float32. Needs
    `instruction_sets(product)`.
    """
    shape = (a.shape[1] if transpose_a else a.shape[0], b.shape[0] if transpose_b else b.shape[1])
    name = instruction_sets(product)[-1] if instructions == "best" else instructions
    kernel_choice.record_kernel(f"matmul_{jnp.dtype(product).name}", name)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, out_dtype), vmap_method="sequential")
    return call(
        a,
        b,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        is_half=jnp.dtype(product) == jnp.bfloat16,
        instructions=name,
    )


def attention_instruction_sets() -> tuple[str, ...]:
    """Lists the instruction sets with kernels of flash.py on this machine, best last, as `instruction_sets` does.

    It is empty with a library that was built from older sources and lacks them.
    """
    library = _library()
    if library is None or not hasattr(library, "efficientllm_flash_instruction_sets"):
        return ()
    names = library.efficientllm_flash_instruction_sets
    names.restype, names.argtypes = ctypes.c_char_p, []
    return tuple(name for name in names().decode().split() if cpuinfo.is_allowed(name.upper()))


@functools.cache
def _library():
    libraries = sorted(pathlib.Path(__file__).parent.glob("_matmul*.so"))
    if not libraries:
        log.warning(
            "no native matrix products (setup.py found no compiler, or ran before there were any): XLA multiplies"
        )
        return None
    try:
        library = ctypes.CDLL(str(libraries[0]))
        targets = [TARGET, *(target for target in ATTENTION if hasattr(library, target))]
        capsules = {target: jax.ffi.pycapsule(getattr(library, target)) for target in targets}
        names = library.efficientllm_matmul_instruction_sets
    except (OSError, AttributeError) as error:
        log.warning("native matrix products cannot be loaded (%s): XLA multiplies", error)
        return None
    names.restype, names.argtypes = ctypes.c_char_p, [ctypes.c_bool]
    for target, capsule in capsules.items():
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return library
