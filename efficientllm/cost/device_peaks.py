"""What a device could do at best: datasheet figures by exact device name, and a matrix product measured on this host.

Figures are dense (without structured sparsity), per device as JAX counts devices, in FLOP/s and byte/s.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from efficientllm.cost.hardware_table import table
from efficientllm.metrics import host
from efficientllm.metrics.reading import Reading, missing
from efficientllm.runtime.atomic_write import write_atomically

log = logging.getLogger("efficientllm")
CONVENTION = "matmul FLOPs of the model (causal half, lookup 0, router counted, optimiser not)"
EXECUTED = "matmul FLOPs of the program, with all that it masks, drops and computes twice"


@dataclasses.dataclass(frozen=True)
class Peak:
    """Datasheet peaks of one device; `flops` by compute dtype, where `tf32` is float32 on NVIDIA's tensor cores.

    Of GeForces they are of products that accumulate in float32, as JAX's do, at half of the rate in the headlines.
    """

    flops: dict
    bandwidth: float
    source: str


# Keyed by what JAX calls `device_kind`. A device that is not here has no MFU: a near name may be half as fast.
PEAKS = {facts["device_kind"]: Peak(**facts["peaks"]) for facts in table()["hardware"].values() if "peaks" in facts}


def peak_flops(device_kind, dtype):
    """Dense peak of one device at a compute dtype (`"bfloat16"`, `"tf32"`, ...) in FLOP/s, as a Reading."""
    peak = PEAKS.get(device_kind)
    if peak is None:
        return missing("FLOP/s", f"no datasheet peak known for {device_kind!r}")
    if dtype not in peak.flops:
        return missing("FLOP/s", f"no {dtype} peak known for {device_kind!r}")
    return Reading(peak.flops[dtype], "FLOP/s", peak.source)


def peak_bandwidth(device_kind):
    """Peak memory bandwidth of one device in byte/s, as a Reading."""
    peak = PEAKS.get(device_kind)
    if peak is None:
        return missing("byte/s", f"no datasheet bandwidth known for {device_kind!r}")
    return Reading(peak.bandwidth, "byte/s", peak.source)


def model_flops_utilisation(flops, seconds, devices, dtype):
    """`{"mfu": Reading, "mfu_gemm": Reading}`: model FLOPs done in `seconds` on `devices` over what they could do.

    `mfu` is against the datasheet, `mfu_gemm` against the best matrix product measured on this host. The CPU devices
    of one process share its cores and count as one. float32 on an NVIDIA GPU is held against TF32, as which JAX runs
    it at its default precision.
    """
    return _utilisation(("mfu", "mfu_gemm"), CONVENTION, flops, seconds, devices, dtype)


def hardware_flops_utilisation(flops, seconds, devices, dtype):
    """`{"hfu": Reading, "hfu_gemm": Reading}`: as `model_flops_utilisation`, of the FLOPs that a program executes.

    `flops` is a Reading: None where a program's FLOPs cannot be counted.
    """
    if flops.value is None:
        return {key: missing("1", flops.reason) for key in ("hfu", "hfu_gemm")}
    return _utilisation(("hfu", "hfu_gemm"), EXECUTED, flops.value, seconds, devices, dtype)


def _utilisation(keys, convention, flops, seconds, devices, dtype):
    kind, count = devices[0].device_kind, parallel(devices)
    dtype = jnp.dtype(dtype).name
    peaks = (
        peak_flops(kind, "tf32" if dtype == "float32" and kind.startswith("NVIDIA") else dtype),
        measure_gemm_peak(dtype),
    )
    rate = flops / (seconds * count)
    return {key: _share(peak, rate, convention) for key, peak in zip(keys, peaks, strict=True)}


def parallel(devices):
    """How many of the devices can be busy at a time: the CPU devices of a process are one machine."""
    on_cpu = devices[0].platform == "cpu"
    return len({device.process_index for device in devices}) if on_cpu else len(devices)


def _share(peak, rate, convention):
    if peak.value is None:
        return missing("1", peak.reason)
    return Reading(rate / peak.value, "1", f"{convention} over {peak.value / 1e9:.4g} GFLOP/s: {peak.source}")


@functools.cache
def measure_gemm_peak(dtype):
    """Best rate of a square matrix product on one local device in FLOP/s, as a Reading; takes seconds, once a host.

    Kept in `$EFFICIENTLLM_CACHE/gemm_peaks.json` (`~/.cache/efficientllm`) under host, cores, device, dtype and jax
    version; removing the file measures again, as one should if the host was busy at the first time.
    """
    best = _once("gemm_peaks.json", dtype, lambda: _best_gemm(dtype))
    return Reading(best, "FLOP/s", f"best {dtype} matrix product measured on this host")


@functools.cache
def measure_copy_bandwidth():
    """Best rate at which one local device copies a large array in byte/s, read and written, as a Reading.

    Kept as `measure_gemm_peak`'s is, in `copy_bandwidths.json`.
    """
    best = _once("copy_bandwidths.json", "copy", best_copy)
    return Reading(best, "byte/s", "best copy of a large array measured on this host, read and written")


def bandwidth_utilisation(bytes_, seconds, devices, what="weights and state read"):
    """`{"mbu": Reading, "mbu_copy": Reading}`: bytes that had to move in `seconds` over what `devices` could move.

    `mbu` is against the datasheet, `mbu_copy` against a copy measured on this host.
    """
    count = parallel(devices)
    found = {"mbu": peak_bandwidth(devices[0].device_kind), "mbu_copy": measure_copy_bandwidth()}
    return {
        key: missing("1", peak.reason)
        if peak.value is None
        else Reading(
            bytes_ / (seconds * count * peak.value),
            "1",
            f"{what} over {peak.value / 1e9:.4g} GB/s: {peak.source}",
        )
        for key, peak in found.items()
    }


def measured_roofline(flops, bytes_, devices, dtype):
    """The time in s below which `devices` cannot do `flops` and move `bytes_`, as a Reading: the longer of the two, at
    the rates measured on this host."""
    flops_s = flops / (parallel(devices) * measure_gemm_peak(jnp.dtype(dtype).name).value)
    bytes_s = bytes_ / (parallel(devices) * measure_copy_bandwidth().value)
    bound = f"max({flops_s:.3g} s of FLOPs at the best matrix product, {bytes_s:.3g} s of bytes at the best copy)"
    return Reading(max(flops_s, bytes_s), "s", f"{bound}, both measured on this host")


def _once(file, what, measure):
    """`measure()`, kept in a file of the cache. A damaged file is measured again; one that cannot be written is not
    kept, since a rate is not worth a run."""
    path, key = cache_folder() / file, _host_key(what)
    known = _rates(path)
    if key not in known:
        known[key] = measure()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known, indent=2))
        except OSError as error:
            log.warning(f"{path} cannot be written ({error.strerror}): the next run measures this machine again")
    return known[key]


def _rates(path):
    """The rates that a file holds: positive numbers by host and what was measured."""
    try:
        known = json.loads(path.read_text())
        if not all(isinstance(rate, float) and 0 < rate < math.inf for rate in known.values()):
            raise ValueError("not a rate")
        return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        log.warning(f"{path} is damaged ({error}): this machine is measured again")
        return {}


def cache_folder():
    """Where measurements of this host are kept."""
    return Path(os.environ.get("EFFICIENTLLM_CACHE") or Path.home() / ".cache" / "efficientllm")


def _host_key(dtype):
    name = host.name_hash()
    return f"{name} {host.usable_cores()} cores {jax.local_devices()[0].device_kind} {dtype} jax {jax.__version__}"


def _best_gemm(dtype, sizes=None, repeats=8):
    """Best FLOP/s over sizes and repeats; low precisions accumulate into float32, as the models' products do."""
    sizes = sizes or ((512, 1024) if jax.default_backend() == "cpu" else (4096, 8192))
    best = 0.0
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    for size in sizes:
        a = jnp.ones((size, size), dtype)
        product(a, a).block_until_ready()
        for _ in range(repeats):
            begin = time.perf_counter()
            product(a, a).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def best_copy(size=None, repeats=8, apart=False):
    """Best byte/s of a copy of `size` floats, far beyond the caches, each element read and written: `x + 1` where x
    lies; or `apart`, from one array into another, whose lines a CPU reads too before it writes them, uncounted."""
    size = size or (2**26 if jax.default_backend() == "cpu" else 2**28)
    copy = jax.jit(lambda x, source: x.at[:].set(source) if apart else x + 1, donate_argnums=0)
    x, source = jnp.zeros(size, jnp.float32), jnp.ones(size if apart else 1, jnp.float32)
    x = jax.block_until_ready(copy(x, source))
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        x = jax.block_until_ready(copy(x, source))
        best = max(best, 2 * 4 * size / (time.perf_counter() - begin))
    return best


def best_read(size=2**26, repeats=8):
    """Best byte/s at which an array of `size` floats, far beyond the caches, is read and nothing like it written."""
    largest = jax.jit(lambda x: jnp.max(x.reshape(-1, 1024), 0))
    x = jnp.ones(size, jnp.float32)
    jax.block_until_ready(largest(x))
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(largest(x))
        best = max(best, x.nbytes / (time.perf_counter() - begin))
    return best
