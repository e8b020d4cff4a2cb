"""Energy of a stretch of finished work, from the best source that the devices have.

    reader = open_reader(jax.local_devices())
    jax.block_until_ready(state)
    with reader.window() as window:
        ...                       # steady work only: no compilation, checkpoint or evaluation
        jax.block_until_ready(state)
    window.result                 # an EnergyWindow

Sources, the first that all devices have: a meter if one is given, NVML's energy counter, NVML's instantaneous power,
NVML's averaged power, what `zeus` reads of other devices (RAPL, AMD, Apple, Jetson), none. A window that cannot be
trusted is void: its energy is None and `reason` says why.
"""

import dataclasses
import glob
import os
import time

from efficientllm.metrics.energy import nvml as nvml_module
from efficientllm.metrics.energy.meter_and_zeus import MeterReader, zeus_reader
from efficientllm.metrics.energy.nvml_readers import CounterReader, PowerReader
from efficientllm.metrics.energy.window import (
    COMPILED,
    STOPPED,
    EnergyWindow,
    Reader,
    combine,
    over_processes,
    unavailable,
    void,
)

__all__ = [
    "COMPILED",
    "STOPPED",
    "EnergyWindow",
    "Reader",
    "combine",
    "open_reader",
    "over_processes",
    "unavailable",
    "void",
]


def open_reader(devices, nvml=None, identify=nvml_module.pci_bus_ids, clock=time.monotonic, sleep=time.sleep, meter=""):
    """The best reader for these local JAX devices; what cannot be read is a reader that says why.

    `meter` is the file of a meter (`config.metrics.meter`); only a bad one raises, a UserError. `nvml` (a pynvml-like
    module), `identify` (devices -> PCI bus ids), `clock` and `sleep` are there for tests.
    Finding the counter's tick takes about half a second.
    """
    platform = devices[0].platform
    if meter:
        return MeterReader(meter)
    if platform == "cpu":
        return _cpu_reader(clock)
    if platform == "rocm":
        return zeus_reader("gpu", clock)
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


def _cpu_reader(clock):
    """RAPL or an SoC's counters where they can be read; else why not, and the one-line remedy."""
    zones = rapl_zones()
    if zones and not all(os.access(zone, os.R_OK) for zone in zones):
        return Reader("RAPL is readable by root only: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj", clock)
    reader = zeus_reader("cpu", clock)
    if reader.reason and not zones:
        return Reader(f"no energy counter on this machine ({reader.reason})", clock)
    return reader


def rapl_zones():
    """Files of the kernel's energy counters of CPUs."""
    return glob.glob("/sys/class/powercap/intel-rapl:*/energy_uj")


IDLE_S = 2.0  # of rest before and after the work
DRIFT = 0.05


@dataclasses.dataclass(frozen=True)
class Idle:
    """Mean power at rest in W, of the devices of this process, or why there is none; `drifted` if it moved."""

    power_w: float | None
    reason: str | None
    drift: float | None = None

    def compared(self, after):
        """This rest with another one's drift: more than DRIFT means that net energy is no good number."""
        if self.power_w is None or after.power_w is None:
            return self
        return dataclasses.replace(self, drift=after.power_w / self.power_w - 1)

    @property
    def drifted(self):
        return self.drift is not None and abs(self.drift) > DRIFT


def idle_power(reader, sleep=time.sleep, seconds=IDLE_S):
    """Power at rest: to be called with the device's client there and nothing running. No time passes where no energy
    can be read."""
    if reader.reason is not None:
        return Idle(None, reader.reason)
    with reader.window() as window:
        sleep(seconds)
    return Idle(window.result.mean_power_w, window.result.reason)
