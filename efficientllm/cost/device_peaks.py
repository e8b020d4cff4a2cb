"""Peak FLOP/s and bandwidth of devices: datasheet figures, rates measured on this host, and MFU, HFU, MBU.

Datasheet figures are dense (without structured sparsity), per JAX device, in FLOP/s and byte/s.
"""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from efficientllm.cost.hardware_table import read_table
from efficientllm.metrics import host
from efficientllm.metrics.reading import Reading, missing
from efficientllm.runtime import user_cache
from efficientllm.runtime.atomic_write import write_atomically

log = logging.getLogger("efficientllm")
CONVENTION = "matmul FLOPs of the model (causal half, lookup 0, router counted, optimiser not)"
EXECUTED = "matmul FLOPs of the program, with masked, dropped and rematerialized ones"


@dataclasses.dataclass(frozen=True)
class Peak:
    """Datasheet peaks of a device; `flops` by compute dtype, where `tf32` is float32 on NVIDIA's tensor cores.

    GeForce figures are for products that accumulate in float32, as JAX's do: half of the headline rate.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str


# By JAX's `device_kind`. An unknown device has no MFU: one with a similar name may be half as fast.
PEAKS = {
    facts["device_kind"]: Peak(**facts["peaks"]) for facts in read_table()["hardware"].values() if "peaks" in facts
}


def peak_flops(device_kind: str, dtype: str) -> Reading:
    """Dense peak of one device at a compute dtype (`"bfloat16"`, `"tf32"`, ...) in FLOP/s, as a Reading."""
    peak = PEAKS.get(device_kind)
    if peak is None:
        return missing("FLOP/s", f"no datasheet peak known for {device_kind!r}")
    if dtype not in peak.flops:
        return missing("FLOP/s", f"no {dtype} peak known for {device_kind!r}")
    return Reading(peak.flops[dtype], "FLOP/s", peak.source)


def peak_bandwidth(device_kind: str) -> Reading:
    """Peak memory bandwidth of one device in byte/s, as a Reading."""
    peak = PEAKS.get(device_kind)
    if peak is None:
        return missing("byte/s", f"no datasheet bandwidth known for {device_kind!r}")
    return Reading(peak.bandwidth, "byte/s", peak.source)


def model_flops_utilisation(
    flops: float, seconds: float, devices: Sequence[jax.Device], dtype: jax.typing.DTypeLike
) -> dict[str, Reading]:
    """`{"mfu": Reading, "mfu_gemm": Reading}`: rate of model FLOPs over the peak rate of `devices`.

    The peak of `mfu` is the datasheet's, that of `mfu_gemm` the best matrix product measured on this host. CPU devices
    of a process share its cores and count as one. For float32 on an NVIDIA GPU the peak is TF32's, as which JAX runs
    it at its default precision.
    """
    return _utilisation(("mfu", "mfu_gemm"), CONVENTION, flops, seconds, devices, dtype)


def hardware_flops_utilisation(
    flops: Reading, seconds: float, devices: Sequence[jax.Device], dtype: jax.typing.DTypeLike
) -> dict[str, Reading]:
    """`{"hfu": Reading, "hfu_gemm": Reading}`: like `model_flops_utilisation`, for the FLOPs that a program executes.

    `flops` is a Reading: None where a program's FLOPs cannot be counted.
    """
    if flops.value is None:
        return {key: missing("1", flops.reason) for key in ("hfu", "hfu_gemm")}
    return _utilisation(("hfu", "hfu_gemm"), EXECUTED, flops.value, seconds, devices, dtype)


def _utilisation(keys, convention, flops, seconds, devices, dtype):
    kind, count = devices[0].device_kind, count_parallel(devices)
    dtype = jnp.dtype(dtype).name
    peaks = (
        peak_flops(kind, "tf32" if dtype == "float32" and kind.startswith("NVIDIA") else dtype),
        measure_gemm_peak(dtype),
    )
    rate = flops / (seconds * count)
    return {key: _share(peak, rate, convention) for key, peak in zip(keys, peaks, strict=True)}


def count_parallel(devices: Sequence[jax.Device]) -> int:
    """Counts the devices that can be busy at once: all CPU devices of a process count as one."""
    on_cpu = devices[0].platform == "cpu"
    return len({device.process_index for device in devices}) if on_cpu else len(devices)


def _share(peak, rate, convention):
    if peak.value is None:
        return missing("1", peak.reason)
    return Reading(rate / peak.value, "1", f"{convention} over {peak.value / 1e9:.4g} GFLOP/s: {peak.source}")


@functools.cache
def measure_gemm_peak(dtype: str) -> Reading:
    """Best rate of a square matrix product on one local device in FLOP/s, as a Reading; takes seconds, once a host.

    Products of bfloat16 are into float32, those of int8 into int32.

    Cached in `$EFFICIENTLLM_CACHE/gemm_peaks.json` (`~/.cache/efficientllm`) by host, cores, device, dtype and jax
    version. If the host was busy at the first measurement, remove the file.
    """
    best = _cached("gemm_peaks.json", dtype, lambda: _best_gemm(dtype))
    return Reading(best, "FLOP/s", f"best {dtype} matrix product measured on this host")


@functools.cache
def measure_copy_bandwidth() -> Reading:
    """Best rate of a copy of a large array on one local device in byte/s, read and written, as a Reading.

    Cached like `measure_gemm_peak`, in `copy_bandwidths.json`.
    """
    best = _cached("copy_bandwidths.json", "copy", measure_copy)
    return Reading(best, "byte/s", "best copy of a large array measured on this host, read and written")


def bandwidth_utilisation(
    bytes_: float, seconds: float, devices: Sequence[jax.Device], what: str = "weights and state read"
) -> dict[str, Reading]:
    """`{"mbu": Reading, "mbu_copy": Reading}`: rate of the necessary memory traffic over the bandwidth of `devices`.

    The peak of `mbu` is the datasheet's, that of `mbu_copy` a copy measured on this host.
    """
    count = count_parallel(devices)
    peaks = {"mbu": peak_bandwidth(devices[0].device_kind), "mbu_copy": measure_copy_bandwidth()}
    return {
        key: missing("1", peak.reason)
        if peak.value is None
        else Reading(
            bytes_ / (seconds * count * peak.value),
            "1",
            f"{what} over {peak.value / 1e9:.4g} GB/s: {peak.source}",
        )
        for key, peak in peaks.items()
    }


def measured_roofline(
    flops: float, bytes_: float, devices: Sequence[jax.Device], dtype: jax.typing.DTypeLike
) -> Reading:
    """Roofline time in s as a Reading: the longer of `flops` and `bytes_`, at the rates measured on this host."""
    flops_s = flops / (count_parallel(devices) * measure_gemm_peak(jnp.dtype(dtype).name).value)
    bytes_s = bytes_ / (count_parallel(devices) * measure_copy_bandwidth().value)
    bound = f"max({flops_s:.3g} s of FLOPs at the best matrix product, {bytes_s:.3g} s of bytes at the best copy)"
    return Reading(max(flops_s, bytes_s), "s", f"{bound}, both measured on this host")


def _cached(file, quantity, measure):
    """`measure()`, cached in a file. Failing to read or write the cache is only a warning."""
    path, key = user_cache.folder() / file, _host_key(quantity)
    rates = _rates(path)
    if key not in rates:
        rates[key] = measure()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(rates, indent=2))
        except OSError as error:
            log.warning(f"{path} cannot be written ({error.strerror}): the next run measures this machine again")
    return rates[key]


def _rates(path):
    """Reads the cached rates of a file: positive numbers by host and quantity."""
    try:
        rates = json.loads(path.read_text())
        if not all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates.values()):
            raise ValueError("not a rate")
        return rates
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        log.warning(f"{path} is damaged ({error}): this machine is measured again")
        return {}


def _host_key(dtype):
    name = host.name_hash()
    return f"{name} {host.usable_cores()} cores {jax.local_devices()[0].device_kind} {dtype} jax {jax.__version__}"


def _best_gemm(dtype, sizes=None, repeats=8):
    """Best FLOP/s over sizes and repeats; low precisions accumulate into float32, as the models' products do."""
    is_whole, on_cpu = jnp.issubdtype(dtype, jnp.integer), jax.default_backend() == "cpu"
    # XLA for CPUs multiplies integers at some GFLOP/s: 1,024 rows would take seconds.
    sizes = sizes or ((512,) if is_whole and on_cpu else (512, 1024) if on_cpu else (4096, 8192))
    best, result = 0.0, jnp.int32 if is_whole else jnp.float32
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=result))
    for size in sizes:
        a = jnp.ones((size, size), dtype)
        product(a, a).block_until_ready()
        for _ in range(repeats):
            begin = time.perf_counter()
            product(a, a).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def measure_copy(size: int | None = None, repeats: int = 8, apart: bool = False) -> float:
    """Measures the best byte/s of a copy of `size` floats, which exceed the caches; reads and writes both count.

    The copy is `x + 1` in place; with `apart` it goes from one array into another. A CPU reads the target's cache
    lines before it writes them, which is not counted.
    """
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


def measure_read(size: int = 2**26, repeats: int = 8) -> float:
    """Measures the best byte/s of reading `size` floats, which exceed the caches, with little written."""
    largest = jax.jit(lambda x: jnp.max(x.reshape(-1, 1024), 0))
    x = jnp.ones(size, jnp.float32)
    jax.block_until_ready(largest(x))
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(largest(x))
        best = max(best, x.nbytes / (time.perf_counter() - begin))
    return best
