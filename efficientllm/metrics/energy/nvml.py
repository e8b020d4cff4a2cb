"""NVIDIA GPUs through NVML (`pynvml`); a reading that the driver refuses is None, and `refusals` says why."""

import ctypes
import os
import types
import warnings
from collections.abc import Sequence

import jax

# Slowdowns that make a run incomparable. A software power cap is not among them: a loaded GPU normally runs at the
# board's power limit, and its energy is still right. `power_capped` records it.
SLOWDOWNS = {
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
SUPERCHIPS = ("GH200", "GB200", "GB300")


class NvmlUnavailable(Exception):
    """NVML cannot be used; the message says why and what to do."""


def load_pynvml() -> types.ModuleType:
    """Imports and initialises `pynvml`. Raises NvmlUnavailable without the module, the library or the driver."""
    try:
        with warnings.catch_warnings():  # the package named pynvml warns that nvidia-ml-py now carries its module
            warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
            import pynvml
        pynvml.nvmlInit()
    except ImportError:
        raise NvmlUnavailable("pynvml is not installed: pip install nvidia-ml-py") from None
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML does not start: {error}; check that nvidia-smi works") from None
    return pynvml


def pci_bus_ids(devices: Sequence[jax.Device]) -> list[str]:
    """PCI bus ids of the local JAX devices, e.g. `"00000000:3B:00.0"`, from the CUDA driver.

    JAX knows a local GPU by its CUDA ordinal (`local_hardware_id`). Ordinals depend on CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER, NVML's indices do not; only the driver in this process can translate.
    Raises NvmlUnavailable without a CUDA driver, as on an AMD GPU.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NvmlUnavailable(f"no CUDA driver to name the devices by PCI id: {error}") from None
    return [_pci_bus_id(cuda, device.local_hardware_id) for device in devices]


def _pci_bus_id(cuda, ordinal):
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), ordinal),
        lambda: cuda.cuDeviceGetPCIBusId(text, len(text), device),
    )
    for call in calls:
        status = call()
        if status != 0:
            raise NvmlUnavailable(f"the CUDA driver gives no PCI id for device {ordinal}: error {status}")
    return text.value.decode()


class Gpu:
    """A GPU in NVML, looked up by its PCI bus id.

    A reading that NVML refuses is None; `refusals` maps its name to the driver's message.
    Raises NvmlUnavailable if NVML has no such device.
    """

    def __init__(self, nvml: types.ModuleType, pci_bus_id: str):
        self._nvml = nvml
        self.pci_bus_id = pci_bus_id
        self.refusals: dict[str, str] = {}
        try:
            self._handle = nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except nvml.NVMLError as error:
            raise NvmlUnavailable(f"NVML does not know the GPU at {pci_bus_id}: {error}") from None

    def _read(self, name, read):
        try:
            return read(self._handle)
        except self._nvml.NVMLError as error:
            self.refusals[name] = str(error)
            return None

    def name(self) -> str | None:
        """Product name, equal to JAX's `device_kind`."""
        return self._read("name", self._nvml.nvmlDeviceGetName)

    def is_superchip(self) -> bool:
        """True if the energy counter covers a whole module: GPU, CPU and memory."""
        return any(chip in (self.name() or "") for chip in SUPERCHIPS)

    def driver(self) -> dict[str, str | None]:
        """`{"driver": version, "cuda": newest CUDA version that the driver runs}`."""
        cuda = self._read("CUDA version", lambda _: self._nvml.nvmlSystemGetCudaDriverVersion())
        return {
            "driver": self._read("driver version", lambda _: self._nvml.nvmlSystemGetDriverVersion()),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        }

    def uuid(self) -> str | None:
        """The GPU's UUID."""
        return self._read("uuid", self._nvml.nvmlDeviceGetUUID)

    def energy_j(self) -> float | None:
        """Total energy since the driver was loaded, in J (the counter is in mJ; Volta and later)."""
        millijoules = self._read("energy counter", self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3

    def power_instant_w(self) -> float | None:
        """Power now in W, from the field that is instantaneous on every architecture."""
        return self._read("instantaneous power", self._power_field)

    def _power_field(self, handle):
        field = self._nvml.nvmlDeviceGetFieldValues(handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn != self._nvml.NVML_SUCCESS:
            raise self._nvml.NVMLError(field.nvmlReturn)
        return field.value.uiVal / 1e3

    def power_average_w(self) -> float | None:
        """Power in W from the older call: a 1 s average on Ampere (except GA100) and later, instantaneous before."""
        milliwatts = self._read("averaged power", self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1e3

    def power_limit_w(self) -> float | None:
        """Enforced power limit in W."""
        milliwatts = self._read("power limit", self._nvml.nvmlDeviceGetEnforcedPowerLimit)
        return None if milliwatts is None else milliwatts / 1e3

    def clocks_mhz(self) -> dict[str, int | None]:
        """Clocks now, `{"sm": MHz, "memory": MHz}`."""
        kinds = {"sm": self._nvml.NVML_CLOCK_SM, "memory": self._nvml.NVML_CLOCK_MEM}
        read = self._nvml.nvmlDeviceGetClockInfo
        return {key: self._read(f"{key} clock", lambda h, k=kind: read(h, k)) for key, kind in kinds.items()}

    def memory_bytes(self) -> tuple[int | None, int | None]:
        """`(used, total)` bytes of the GPU over all processes; `(None, None)` if unreadable."""
        info = self._read("memory", self._nvml.nvmlDeviceGetMemoryInfo)
        return (None, None) if info is None else (info.used, info.total)

    def utilisation(self) -> float | None:
        """Share 0..1 of the last sample period in which a kernel ran. This is not MFU."""
        rates = self._read("utilisation", self._nvml.nvmlDeviceGetUtilizationRates)
        return None if rates is None else rates.gpu / 100

    def mig(self) -> bool:
        """True if the GPU is split into MIG slices: NVML gives power and memory of the whole GPU only."""
        modes = self._read("MIG mode", self._nvml.nvmlDeviceGetMigMode)
        return modes is not None and modes[0] == 1

    def persistence(self) -> bool | None:
        """True if the driver stays loaded between processes and keeps its counters and clocks; None if unreadable."""
        mode = self._read("persistence mode", self._nvml.nvmlDeviceGetPersistenceMode)
        return None if mode is None else bool(mode)

    def other_processes(self) -> int:
        """Counts the other compute processes on the GPU."""
        listed = self._read("processes", self._nvml.nvmlDeviceGetComputeRunningProcesses)
        pids = {process.pid for process in listed or ()}
        # Inside a container NVML lists process ids of the host, and one of them is this process.
        return max(0, len(pids) - 1) if os.getpid() not in pids else len(pids - {os.getpid()})

    def slowdowns(self) -> list[str]:
        """Names of the slowdowns in force now."""
        reasons = self._read("throttle reasons", self._nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return [text for constant, text in SLOWDOWNS.items() if reasons & getattr(self._nvml, constant)]

    def power_capped(self) -> bool | None:
        """True if the power limit lowers the clocks now; None if unreadable."""
        reasons = self._read("throttle reasons", self._nvml.nvmlDeviceGetCurrentClocksEventReasons)
        return None if reasons is None else bool(reasons & self._nvml.nvmlClocksEventReasonSwPowerCap)
