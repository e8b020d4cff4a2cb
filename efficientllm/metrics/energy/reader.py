"""`open_reader`, the best energy reader for the local devices, and `idle_power`.

    reader = open_reader(jax.local_devices())
    jax.block_until_ready(state)
    with reader.window() as window:
        ...                       # steady work only: no compilation, checkpoint or evaluation
        jax.block_until_ready(state)
    window.result                 # an EnergyWindow

Sources, best first: the user's meter, NVML's energy counter, NVML's instantaneous power, NVML's averaged power, the
counters that `zeus` reads (RAPL, AMD, Apple, Jetson). All devices must have the source. A window that cannot be trusted
is void: its energy is None and `reason` says why.
"""

import dataclasses
import glob
import os
import time
import types
from collections.abc import Callable, Sequence

import jax

from efficientllm.metrics.energy import nvml as nvml_module
from efficientllm.metrics.energy.meter_and_zeus import MeterReader, zeus_reader
from efficientllm.metrics.energy.nvml_readers import CounterReader, PowerReader
from efficientllm.metrics.energy.window import (
    COMPILED,
    STOPPED,
    EnergyReader,
    EnergyWindow,
    combine_windows,
    sum_over_processes,
    unavailable_window,
    void_window,
)

__all__ = [
    "COMPILED",
    "STOPPED",
    "EnergyWindow",
    "EnergyReader",
    "combine_windows",
    "open_reader",
    "sum_over_processes",
    "unavailable_window",
    "void_window",
]

IDLE_S = 2.0  # idle time measured before and after the work
DRIFT = 0.05  # of idle power; above it net energy is not meaningful


def open_reader(
    devices: Sequence[jax.Device],
    nvml: types.ModuleType | None = None,
    identify: Callable[[Sequence[jax.Device]], list[str]] = nvml_module.pci_bus_ids,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    meter: str = "",
) -> EnergyReader:
    """Opens the best energy reader for these local JAX devices; without a source, an EnergyReader that says why.

    meter: the file of a meter (`config.metrics.meter`). Raises UserError if it cannot be read.
    nvml:  a module with pynvml's functions; like `identify` (devices -> PCI bus ids), `clock` and `sleep` for tests.
    Takes about half a second, in which the counter's tick is measured.
    """
    platform = devices[0].platform
    if meter:
        return MeterReader(meter)
    if platform == "cpu":
        return _cpu_reader(clock)
    if platform == "rocm":
        return zeus_reader("gpu", clock)
    if platform not in ("gpu", "cuda"):
        return EnergyReader(f"no energy reader for {platform} devices", clock)
    try:
        nvml = nvml or nvml_module.load_pynvml()
        gpus = [nvml_module.Gpu(nvml, bus_id) for bus_id in identify(devices)]
    except nvml_module.NvmlUnavailable as error:
        return EnergyReader(str(error), clock)
    if any(gpu.mig() for gpu in gpus):
        return EnergyReader("MIG slice: NVML gives the power of the whole GPU only", clock)
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
    return EnergyReader("; ".join(failures), clock)


def _cpu_reader(clock):
    """A reader of RAPL or an SoC's counters; if they cannot be read, one that says why, with the remedy."""
    zones = rapl_zones()
    if zones and not all(os.access(zone, os.R_OK) for zone in zones):
        return EnergyReader(
            "RAPL is readable by root only: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj", clock
        )
    reader = zeus_reader("cpu", clock)
    if reader.reason and not zones:
        return EnergyReader(f"no energy counter on this machine ({reader.reason})", clock)
    return reader


def rapl_zones() -> list[str]:
    """Files of the kernel's CPU energy counters (RAPL)."""
    return glob.glob("/sys/class/powercap/intel-rapl:*/energy_uj")


@dataclasses.dataclass(frozen=True)
class IdlePower:
    """Mean power in W of this process's devices at rest, or the reason why it is unavailable.

    `drift` is its relative change from before the work to after it.
    """

    power_w: float | None
    reason: str | None
    drift: float | None = None

    def compared(self, after: "IdlePower") -> "IdlePower":
        """This idle power with its drift to `after`, the idle power after the work."""
        if self.power_w is None or after.power_w is None:
            return self
        return dataclasses.replace(self, drift=after.power_w / self.power_w - 1)

    @property
    def drifted(self) -> bool:
        """True if the drift exceeds DRIFT."""
        return self.drift is not None and abs(self.drift) > DRIFT


def idle_power(reader: EnergyReader, sleep: Callable[[float], None] = time.sleep, seconds: float = IDLE_S) -> IdlePower:
    """Measures power at rest. JAX's client must exist and nothing may run. Returns at once if energy is unavailable."""
    if reader.reason is not None:
        return IdlePower(None, reader.reason)
    with reader.window() as window:
        sleep(seconds)
    return IdlePower(window.result.mean_power_w, window.result.reason)
