"""Device memory: allocator statistics, the compiler's memory analysis, and the allocator's settings."""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence

from efficientllm.metrics import host
from efficientllm.metrics.reading import Reading, missing

if typing.TYPE_CHECKING:  # reports import this module and start without JAX
    import jax

COMPILED = {
    "argument_bytes": "argument_size_in_bytes",
    "output_bytes": "output_size_in_bytes",
    "alias_bytes": "alias_size_in_bytes",
    "temp_bytes": "temp_size_in_bytes",
    "generated_code_bytes": "generated_code_size_in_bytes",
}
# Three figures of one row that should agree within the share AGREE: measured, planned, predicted.
FIGURES = {
    "peak_memory_bytes": "at the peak of the process",
    "compiled_memory_bytes": "planned by the compiler",
    "predicted_memory_bytes": "by shapes",
}
AGREE = 0.2
SETTINGS = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def peak_bytes(devices: Sequence[jax.Device], rss_before: int | None = None) -> Reading:
    """Peak memory of this process in bytes, summed over its `devices`, as a Reading.

    GPU or TPU: the allocator's peak counter. CPU: the kernel's peak of resident memory minus `rss_before`, the
    `host.rss_bytes()` from before the model existed. Neither counter can be reset: a measured run needs a process of
    its own. Both are counters, so no peak falls between two samples.
    """
    if devices[0].platform == "cpu":
        if rss_before is None:
            return missing("bytes", "resident memory before the model was not recorded")
        return Reading(max(0, host.peak_rss_bytes() - rss_before), "bytes", "peak RSS less RSS before the model")
    peaks = _stats(devices, "peak_bytes_in_use")
    if peaks is None:
        return missing("bytes", f"{devices[0].device_kind} gives no memory statistics")
    return Reading(sum(peaks), "bytes", "allocator's peak_bytes_in_use")


def disagreement(physical: dict) -> str:
    """A note if a row's memory figures differ by more than `AGREE` of the largest; "" if they agree.

    A difference is no error: on a CPU the peak includes the compiler's own memory, on accelerators fragmentation.
    """
    values = {origin: physical[name] for name, origin in FIGURES.items() if physical.get(name)}
    if len(values) < 2 or min(values.values()) >= (1 - AGREE) * max(values.values()):
        return ""
    figures = ", ".join(f"{value / 1e9:.3f} GB {origin}" for origin, value in values.items())
    return f"memory, more than {AGREE:.0%} apart: {figures}"


def pool_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Bytes allocated on `devices` now (arrays and running programs); None where the allocator keeps no count."""
    used = _stats(devices, "bytes_in_use")
    return None if used is None else sum(used)


def limit_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that the allocator may take on `devices`; None where it states no limit."""
    limits = _stats(devices, "bytes_limit")
    return None if limits is None else sum(limits)


def _stats(devices, key):
    stats = [device.memory_stats() for device in devices]
    return [counts[key] for counts in stats] if all(counts and key in counts for counts in stats) else None


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The compiler's memory analysis of an executable, in bytes per device; `{}` where the backend gives none.

    `total_bytes` must be resident at once: arguments, outputs that alias no argument, temporaries and code.
    Sub-byte types count their packed size (int4: half a byte an element), unlike `.nbytes`.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    sizes = {name: getattr(analysis, field) for name, field in COMPILED.items()}
    return {**sizes, "total_bytes": sum(sizes.values()) - 2 * sizes["alias_bytes"]}


def preallocates(devices: Sequence[jax.Device]) -> bool:
    """True if JAX preallocates most of a GPU's memory: NVML's memory in use then measures a setting, not the run."""
    if devices[0].platform not in ("gpu", "cuda"):
        return False
    off = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") in (
        "false",
        "False",
        "0",
    )  # the spellings that jaxlib accepts
    return not off and os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower() != "platform"


def allocator_settings(devices: Sequence[jax.Device]) -> dict[str, typing.Any]:
    """Allocator settings for the provenance: whether it preallocates, and the environment variables that set it."""
    return {"preallocates": preallocates(devices), **{name: os.environ.get(name) for name in SETTINGS}}
