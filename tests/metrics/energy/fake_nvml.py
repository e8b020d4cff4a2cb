"""Fake pynvml with simulated GPUs on a simulated clock. A GPU draws `watts` and updates its counter every `tick_s`."""

import itertools
import math
import types

from efficientllm.metrics.energy import reader


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        """Lets `seconds` pass."""
        self.now += seconds


class FakeGpu:
    """One simulated GPU; what it lacks is named in `lacks` with NVML's error text."""

    def __init__(self, clock, bus_id="00000000:01:00.0", watts=300.0, tick_s=0.1, phase_s=0.03, name="NVIDIA H200"):
        self.clock, self.bus_id, self.tick_s, self.phase_s, self.name = clock, bus_id, tick_s, phase_s, name
        self.history = [(clock.now - 1000, watts)]
        self.lacks, self.processes, self.throttle = {}, [], 0
        self.mig, self.frozen, self.resets = False, False, 0.0
        self.persistence = True
        self.field_power = True

    def set_power(self, watts):
        """Draws `watts` from now on."""
        self.history.append((self.clock.now, watts))

    @property
    def watts(self):
        """Power drawn now."""
        return self.history[-1][1]

    def true_joules(self, until):
        """Energy drawn until a moment, the truth that readers are held to."""
        spans = itertools.pairwise([*self.history, (math.inf, None)])
        return sum(watts * max(0.0, min(until, end) - begin) for (begin, watts), (end, _) in spans)

    def counter_mj(self):
        """The counter: the truth as of the last tick."""
        if self.frozen:
            return 123456
        tick = math.floor((self.clock.now - self.phase_s) / self.tick_s + 1e-9) * self.tick_s + self.phase_s
        return round((self.true_joules(tick) - self.resets) * 1e3)


class FakeNvml:
    """The part of pynvml that is used. Indices are in PCI order, which need not be JAX's."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    nvmlClocksEventReasonSwPowerCap = 0x4
    nvmlClocksEventReasonHwSlowdown = 0x8
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, *gpus):
        self.gpus = sorted(gpus, key=lambda gpu: gpu.bus_id)

    def _give(self, gpu, what, value):
        if what in gpu.lacks:
            raise self.NVMLError(gpu.lacks[what])
        return value

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        for gpu in self.gpus:
            if gpu.bus_id == bus_id:
                return gpu
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetHandleByIndex(self, index):
        raise AssertionError("devices are matched by PCI id, never by index")

    def nvmlDeviceGetName(self, gpu):
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu):
        return f"GPU-{gpu.bus_id}"

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return self._give(gpu, "counter", gpu.counter_mj())

    def nvmlDeviceGetFieldValues(self, gpu, fields):
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        status = 0 if gpu.field_power else 3
        return [types.SimpleNamespace(nvmlReturn=status, value=types.SimpleNamespace(uiVal=round(gpu.watts * 1e3)))]

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self._give(gpu, "power", round(gpu.watts * 1e3))

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700_000

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[kind]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return self._give(gpu, "memory", types.SimpleNamespace(used=20 * 10**9, total=80 * 10**9))

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return self._give(gpu, "utilisation", types.SimpleNamespace(gpu=90))

    def nvmlDeviceGetMigMode(self, gpu):
        return self._give(gpu, "mig", [int(gpu.mig), int(gpu.mig)])

    def nvmlDeviceGetPersistenceMode(self, gpu):
        return self._give(gpu, "persistence", int(gpu.persistence))

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [types.SimpleNamespace(pid=pid) for pid in gpu.processes]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return gpu.throttle

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self):
        return 13010


def jax_devices(count):
    """Stand-ins for `jax.local_devices()` on a machine with `count` GPUs."""
    return [
        types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", local_hardware_id=i, memory_stats=lambda: None)
        for i in range(count)
    ]


def open_fake(clock, *gpus):
    """A reader of `gpus`, in the order in which JAX has them."""
    return reader.open_reader(
        jax_devices(len(gpus)),
        nvml=FakeNvml(*gpus),
        identify=lambda devices: [gpus[device.local_hardware_id].bus_id for device in devices],
        clock=clock,
        sleep=clock.sleep,
    )
