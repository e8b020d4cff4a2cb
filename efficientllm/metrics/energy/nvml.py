"""NVIDIA GPUs through NVML (`pynvml`): readings that are None, with why, where the driver refuses them."""

import ctypes
import os
import warnings

# Slowdowns that make a run incomparable. A software power cap is not among them: running at the board's own power
# limit is how a loaded GPU normally runs, and its energy is still true; `power_capped` records it.
SLOWDOWNS = {
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
SUPERCHIPS = ("GH200", "GB200", "GB300")


class NvmlUnavailable(Exception):
    """NVML cannot be used; the message says why and what would help."""


def load():
    """The `pynvml` module, initialised. Raises NvmlUnavailable without the module, the library or the driver."""
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


def pci_bus_ids(devices):
    """PCI bus id of each JAX device of this process, e.g. `"00000000:3B:00.0"`, asked of the CUDA driver.

    JAX names a local GPU by its CUDA ordinal (`local_hardware_id`) and gives no PCI id. Ordinals depend on
    CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, NVML's indices on neither, so only the driver of this very process can
    translate. Raises NvmlUnavailable where the CUDA driver cannot be asked (an AMD GPU, for one).
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
    """One GPU, found in NVML by its PCI bus id.

    Every reading is None where NVML refuses it; `refusals` then holds the driver's words under the reading's name.
    Raises NvmlUnavailable if NVML knows no such device.
    """

    def __init__(self, nvml, pci_bus_id):
        self._nvml = nvml
        self.pci_bus_id = pci_bus_id
        self.refusals = {}
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

    def name(self):
        """Product name, as JAX's `device_kind` has it."""
        return self._read("name", self._nvml.nvmlDeviceGetName)

    def is_superchip(self):
        """True where the energy counter covers a whole module: GPU, CPU and memory."""
        return any(chip in (self.name() or "") for chip in SUPERCHIPS)

    def driver(self):
        """`{"driver": version, "cuda": newest CUDA version that the driver runs}`."""
        cuda = self._read("CUDA version", lambda _: self._nvml.nvmlSystemGetCudaDriverVersion())
        return {
            "driver": self._read("driver version", lambda _: self._nvml.nvmlSystemGetDriverVersion()),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        }

    def uuid(self):
        """The GPU's UUID."""
        return self._read("uuid", self._nvml.nvmlDeviceGetUUID)

    def energy_j(self):
        """Total energy since the driver was loaded, in J (the counter is in mJ; Volta and later)."""
        millijoules = self._read("energy counter", self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3

    def power_instant_w(self):
        """Power now, in W, from the field that is instantaneous on every architecture."""
        return self._read("instantaneous power", self._power_field)

    def _power_field(self, handle):
        field = self._nvml.nvmlDeviceGetFieldValues(handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn != self._nvml.NVML_SUCCESS:
            raise self._nvml.NVMLError(field.nvmlReturn)
        return field.value.uiVal / 1e3

    def power_average_w(self):
        """Power in W from the older call: a 1 s average on Ampere (but GA100) and later, instantaneous before."""
        milliwatts = self._read("averaged power", self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1e3

    def power_limit_w(self):
        """Enforced power limit in W."""
        milliwatts = self._read("power limit", self._nvml.nvmlDeviceGetEnforcedPowerLimit)
        return None if milliwatts is None else milliwatts / 1e3

    def clocks_mhz(self):
        """`{"sm": MHz, "memory": MHz}`, now."""
        kinds = {"sm": self._nvml.NVML_CLOCK_SM, "memory": self._nvml.NVML_CLOCK_MEM}
        read = self._nvml.nvmlDeviceGetClockInfo
        return {key: self._read(f"{key} clock", lambda h, k=kind: read(h, k)) for key, kind in kinds.items()}

    def memory_bytes(self):
        """`(used, total)` bytes of the whole GPU, whoever uses them; `(None, None)` where unreadable."""
        info = self._read("memory", self._nvml.nvmlDeviceGetMemoryInfo)
        return (None, None) if info is None else (info.used, info.total)

    def utilisation(self):
        """Share 0..1 of the last sample period in which some kernel ran; it says nothing of how well (not MFU)."""
        rates = self._read("utilisation", self._nvml.nvmlDeviceGetUtilizationRates)
        return None if rates is None else rates.gpu / 100

    def mig(self):
        """True if the GPU is cut into MIG slices, whose power and memory NVML gives for the whole only."""
        modes = self._read("MIG mode", self._nvml.nvmlDeviceGetMigMode)
        return modes is not None and modes[0] == 1

    def persistence(self):
        """True if the driver stays loaded between processes, so that counters and clocks do; None if unreadable."""
        mode = self._read("persistence mode", self._nvml.nvmlDeviceGetPersistenceMode)
        return None if mode is None else bool(mode)

    def other_processes(self):
        """How many compute processes besides this one use the GPU.

        Inside a container NVML lists foreign process ids and never our own: then one of those listed is us.
        """
        listed = self._read("processes", self._nvml.nvmlDeviceGetComputeRunningProcesses)
        pids = {process.pid for process in listed or ()}
        return max(0, len(pids) - 1) if os.getpid() not in pids else len(pids - {os.getpid()})

    def slowdowns(self):
        """Names of the slowdowns in force now."""
        reasons = self._read("throttle reasons", self._nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return [text for constant, text in SLOWDOWNS.items() if reasons & getattr(self._nvml, constant)]

    def power_capped(self):
        """True if the power limit holds the clocks down now; None if unreadable."""
        reasons = self._read("throttle reasons", self._nvml.nvmlDeviceGetCurrentClocksEventReasons)
        return None if reasons is None else bool(reasons & self._nvml.nvmlClocksEventReasonSwPowerCap)
