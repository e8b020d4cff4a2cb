"""Memory in use: what the device's allocator says, what the compiler planned, and how the allocator was set."""

import os

from efficientllm.metrics import host
from efficientllm.metrics.reading import Reading, missing

COMPILED = {
    "argument_bytes": "argument_size_in_bytes",
    "output_bytes": "output_size_in_bytes",
    "alias_bytes": "alias_size_in_bytes",
    "temp_bytes": "temp_size_in_bytes",
    "generated_code_bytes": "generated_code_size_in_bytes",
}
# What was seen, what the compiler planned, what the shapes say; and the share by which they may differ.
ACCOUNTS = {
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


def peak_bytes(devices, rss_before=None):
    """Peak bytes in use over the life of this process, all `devices` (of this process) together, as a Reading.

    On a GPU or TPU the allocator's peak counter; on a CPU the kernel's peak of resident memory less `rss_before`,
    the `host.rss_bytes()` from before the model existed. Neither can be reset, so that a measured run is a process of
    its own; neither is the larger of two looks, between which a peak would be lost.
    """
    if devices[0].platform == "cpu":
        if rss_before is None:
            return missing("bytes", "resident memory before the model was not taken")
        return Reading(max(0, host.peak_rss_bytes() - rss_before), "bytes", "peak RSS less RSS before the model")
    peaks = _stats(devices, "peak_bytes_in_use")
    if peaks is None:
        return missing("bytes", f"{devices[0].device_kind} gives no memory statistics")
    return Reading(sum(peaks), "bytes", "allocator's peak_bytes_in_use")


def disagreement(physical):
    """What to say if a row's accounts of memory are more than `AGREE` of the largest apart; "" if they agree.

    On a CPU the peak holds the compiler's own work as well, and on accelerators fragmentation: that they differ is
    something to know of, and no error.
    """
    values = {said: physical[name] for name, said in ACCOUNTS.items() if physical.get(name)}
    if len(values) < 2 or min(values.values()) >= (1 - AGREE) * max(values.values()):
        return ""
    listed = ", ".join(f"{value / 1e9:.3f} GB {said}" for said, value in values.items())
    return f"memory, more than {AGREE:.0%} apart: {listed}"


def pool_bytes(devices):
    """Bytes that live arrays and running programs hold on `devices` now, or None where the allocator keeps no count."""
    used = _stats(devices, "bytes_in_use")
    return None if used is None else sum(used)


def limit_bytes(devices):
    """Bytes that the allocator may take on `devices`, or None."""
    limits = _stats(devices, "bytes_limit")
    return None if limits is None else sum(limits)


def _stats(devices, key):
    stats = [device.memory_stats() for device in devices]
    return [each[key] for each in stats] if all(each and key in each for each in stats) else None


def compiled_memory(compiled):
    """The compiler's plan for one executable, in bytes per device; `{}` where the backend gives none.

    `total_bytes` is what must be resident at once: arguments, outputs that alias none of them, temporaries and code.
    Sub-byte types count what they take (an int4 array half a byte an element), unlike `.nbytes`.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    sizes = {name: getattr(analysis, field) for name, field in COMPILED.items()}
    return {**sizes, "total_bytes": sum(sizes.values()) - 2 * sizes["alias_bytes"]}


def preallocates(devices):
    """True if JAX takes most of a GPU's memory at start, so that NVML's memory in use is a setting and no result."""
    if devices[0].platform not in ("gpu", "cuda"):
        return False
    off = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") in ("false", "False", "0")  # the spellings jaxlib knows
    return not off and os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower() != "platform"


def allocator(devices):
    """What provenance records of the allocator: whether it preallocates, and the variables that set it."""
    return {"preallocates": preallocates(devices), **{name: os.environ.get(name) for name in SETTINGS}}
