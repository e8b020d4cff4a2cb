"""Energy of a stretch of finished work, from the best source that the devices have.

    reader = open_reader(jax.local_devices())
    jax.block_until_ready(state)
    with reader.window() as window:
        ...                       # steady work only: no compilation, checkpoint or evaluation
        jax.block_until_ready(state)
    window.result                 # an EnergyWindow

Sources, the first that all devices have: NVML's energy counter, NVML's instantaneous power, NVML's averaged power,
none. A window that cannot be trusted is void: its energy is None and `reason` says why.
"""

import glob
import os
import time

from efficientllm.metrics import nvml as nvml_module
from efficientllm.metrics.energy_window import EnergyWindow, Reader, combine, over_processes, unavailable
from efficientllm.metrics.nvml_energy import CounterReader, PowerReader

__all__ = ["EnergyWindow", "Reader", "combine", "open_reader", "over_processes", "unavailable"]


def open_reader(devices, nvml=None, identify=nvml_module.pci_bus_ids, clock=time.monotonic, sleep=time.sleep):
    """The best reader for these local JAX devices; never fails: what cannot be read is a reader that says why.

    `nvml` (a pynvml-like module), `identify` (devices -> PCI bus ids), `clock` and `sleep` are there for tests.
    Finding the counter's tick takes about half a second.
    """
    platform = devices[0].platform
    if platform == "cpu":
        return Reader(_rapl_reason(), clock)
    if platform not in ("gpu", "cuda"):
        return Reader(f"no energy reader for {platform} devices", clock)
    try:
        nvml = nvml or nvml_module.load()
        gpus = [nvml_module.Gpu(nvml, bus_id) for bus_id in identify(devices)]
    except nvml_module.NvmlUnavailable as error:
        return Reader(str(error), clock)
    if any(gpu.mig() for gpu in gpus):
        return Reader("MIG slice: NVML gives the power of the whole GPU only", clock)
    return _nvml_reader(gpus, clock, sleep)


def _nvml_reader(gpus, clock, sleep):
    candidates = (
        lambda: CounterReader(gpus, clock, sleep),
        lambda: PowerReader(gpus, "instantaneous", clock),
        lambda: PowerReader(gpus, "averaged", clock),
    )
    failures = []
    for candidate in candidates:
        reader = candidate()
        if reader.reason is None:
            reader.passed_over = tuple(failures)
            return reader
        failures.append(f"{reader.source}: {reader.reason}")
    return Reader("; ".join(failures), clock)


def _rapl_reason():
    """Why a CPU's energy is not read, and the one-line remedy."""
    zones = glob.glob("/sys/class/powercap/intel-rapl:*/energy_uj")
    if not zones:
        return "no energy counter on this machine"
    if not all(os.access(zone, os.R_OK) for zone in zones):
        return "RAPL is readable by root only: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
    return "RAPL counters are there, but only NVML is read"
