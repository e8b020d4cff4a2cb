"""What Linux says of the first processor, and which of its instructions programs may use."""

import os
import pathlib
import re

FILE = pathlib.Path("/proc/cpuinfo")
# The values of XLA's flag --xla_cpu_max_isa, in order. Instructions may be used from the value of their name on.
LEVELS = ("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX", "AMX_FP16")
# Linux's names of instructions that decide how fast products are, and the level of each.
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_bf16": "AMX",
}
_OF_BFLOAT16 = ("avx512_bf16", "amx_bf16")


def first_processor() -> dict[str, str]:
    """Reads the first value of each key, such as `model name` and `flags`; without the file it is empty."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.strip() for key, _, value in pairs}


def is_allowed(level: str) -> bool:
    """Tells whether `--xla_cpu_max_isa` in XLA_FLAGS, if it is there, allows instructions of a level of LEVELS."""
    limit = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    highest = limit[-1].upper() if limit else ""
    return highest not in LEVELS or level in LEVELS[: LEVELS.index(highest) + 1]


def vector_instructions() -> tuple[str, ...]:
    """Lists the instructions for fast products that the CPU reports and XLA_FLAGS allow."""
    flags = first_processor().get("flags", "").split()
    return tuple(name for name, level in _INSTRUCTIONS.items() if name in flags and is_allowed(level))


def bfloat16_instructions() -> str | None:
    """Names the best instructions of this CPU for products of bfloat16; None without any, and where none is known."""
    return next((name for name in reversed(vector_instructions()) if name in _OF_BFLOAT16), None)
