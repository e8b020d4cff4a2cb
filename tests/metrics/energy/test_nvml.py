import dataclasses
import os
import types

import jax
import pytest

from efficientllm.metrics.energy import nvml
from efficientllm.metrics.energy import reader as energy
from metrics.energy.fake_nvml import Clock, FakeGpu, FakeNvml, jax_devices, open_fake

pytestmark = pytest.mark.quick


@pytest.fixture
def clock():
    return Clock()


def measure(reader, clock, seconds, gpus=(), busy_w=500.0, step_s=0.05):
    """Works at `busy_w` for `seconds`, sampling as a Sampler would, and rests before and after."""
    idle = [gpu.watts for gpu in gpus]
    with reader.window() as window:
        for gpu in gpus:
            gpu.set_power(busy_w)
        for _ in range(round(seconds / step_s)):
            clock.sleep(step_s)
            reader.sample()
        for gpu, watts in zip(gpus, idle, strict=True):
            gpu.set_power(watts)
    return window.result


@pytest.mark.parametrize("seconds", [0.35, 1.05, 5.0])
def test_counter_window_is_the_truth_within_its_bound(clock, seconds):
    gpu = FakeGpu(clock, watts=80.0)
    window = measure(open_fake(clock, gpu), clock, seconds, [gpu], busy_w=500.0)
    assert window.reason is None
    assert (window.source, window.kind, window.scope) == ("nvml energy counter", "measured", "gpu")
    assert window.duration_s == pytest.approx(seconds)
    assert abs(window.mean_power_w / 500.0 - 1) <= window.error_bound < 0.041 / seconds
    assert window.energy_j == pytest.approx(window.mean_power_w * seconds)


def test_the_device_at_rest_is_never_counted_as_work(clock):
    """A window that simply ran on to the next tick would lose a tenth of the power here."""
    gpu = FakeGpu(clock, watts=5.0)
    window = measure(open_fake(clock, gpu), clock, 0.45, [gpu], busy_w=400.0)
    assert window.kind == "measured"
    assert window.mean_power_w == pytest.approx(400.0, rel=0.03)


def test_a_tick_that_never_comes_leaves_the_edge_unaligned(clock):
    gpu = FakeGpu(clock)
    reader = open_fake(clock, gpu)
    reader.start()
    clock.sleep(5.0)
    gpu.tick_s, gpu.phase_s = 1e6, clock.now - 0.02  # the counter stands still from here on
    window = reader.stop()
    assert window.error_bound == pytest.approx(0.041 / 5.0, rel=0.05)
    assert window.energy_j == pytest.approx(300.0 * 5.0, rel=0.05)


def test_counter_reset_voids_the_window(clock):
    gpu = FakeGpu(clock)
    reader = open_fake(clock, gpu)
    reader.start()
    clock.sleep(2.0)
    gpu.resets = gpu.true_joules(clock.now)
    window = reader.stop()
    assert window.energy_j is None and window.mean_power_w is None
    assert "reset" in window.reason


def test_frozen_counter_voids_the_window(clock):
    gpu = FakeGpu(clock)
    reader = open_fake(clock, gpu)
    reader.start()
    stuck = gpu.counter_mj()
    gpu.counter_mj = lambda: stuck
    clock.sleep(3.0)
    window = reader.stop()
    assert window.energy_j is None and "frozen" in window.reason


def test_window_shorter_than_a_tick_is_void(clock):
    window = measure(open_fake(clock, FakeGpu(clock)), clock, 0.05)
    assert window.energy_j is None and "no whole tick" in window.reason


def test_counter_frozen_from_the_start_falls_back_to_power(clock):
    gpu = FakeGpu(clock)
    gpu.frozen = True
    reader = open_fake(clock, gpu)
    assert reader.source == "nvml instantaneous power"
    assert "frozen" in reader.passed_over[0]


def test_missing_counter_falls_back_to_power_integrated_by_trapezoids(clock):
    gpu = FakeGpu(clock, watts=100.0)
    gpu.lacks["counter"] = "Not Supported"
    reader = open_fake(clock, gpu)
    assert reader.passed_over == ("nvml energy counter: Not Supported",)
    reader.start()
    for watts in (100.0, 300.0, 300.0, 200.0):  # read at the end of each 0.1 s
        clock.sleep(0.1)
        gpu.set_power(watts)
        reader.sample()
    window = reader.stop()
    assert (window.source, window.kind) == ("nvml instantaneous power", "sampled")
    assert window.energy_j == pytest.approx(0.1 * (100 + 200 + 300 + 250))
    assert window.error_bound == pytest.approx(0.1 / 0.4)


def test_instantaneous_power_is_preferred_to_the_average(clock):
    gpu = FakeGpu(clock)
    gpu.lacks["counter"] = "Not Supported"
    assert open_fake(clock, gpu).source == "nvml instantaneous power"
    gpu.field_power = False
    reader = open_fake(clock, gpu)
    assert reader.source == "nvml averaged power"
    assert measure(reader, clock, 2.0).error_bound == pytest.approx(1.0 / 2.0)


def test_power_that_nobody_sampled_voids_the_window(clock):
    gpu = FakeGpu(clock)
    gpu.lacks["counter"] = "Not Supported"
    reader = open_fake(clock, gpu)
    with reader.window() as window:
        clock.sleep(2.0)
    assert window.result.energy_j is None and "2.00 s" in window.result.reason


def test_power_that_fails_within_the_window_voids_it(clock):
    gpu = FakeGpu(clock)
    gpu.lacks["counter"], gpu.field_power = "Not Supported", False
    reader = open_fake(clock, gpu)
    reader.start()
    gpu.lacks["power"] = "GPU is lost"
    clock.sleep(0.1)
    assert reader.sample()["power_w"] is None
    assert reader.stop().energy_j is None


def test_missing_permission_is_unavailable_with_the_drivers_words_and_never_zero(clock):
    gpu = FakeGpu(clock)
    gpu.lacks.update(counter="Insufficient Permissions", power="Insufficient Permissions")
    gpu.field_power = False
    reader = open_fake(clock, gpu)
    window = measure(reader, clock, 1.0)
    assert window.energy_j is None and window.mean_power_w is None and window.kind == "unavailable"
    assert "energy counter: Insufficient Permissions" in window.reason
    assert "averaged power: Insufficient Permissions" in window.reason


def test_devices_in_another_order_than_jax_has_them(clock):
    second = FakeGpu(clock, "00000000:81:00.0", watts=100.0)
    first = FakeGpu(clock, "00000000:01:00.0", watts=400.0, phase_s=0.06)
    idle = FakeGpu(clock, "00000000:C1:00.0", watts=50.0)
    nvml_order = FakeNvml(first, second, idle)
    reader = energy.open_reader(
        jax_devices(1), nvml_order, identify=lambda _: [second.bus_id], clock=clock, sleep=clock.sleep
    )
    assert measure(reader, clock, 2.0).mean_power_w == pytest.approx(100.0, rel=0.01)
    both = open_fake(clock, second, first)
    window = measure(both, clock, 2.0)
    assert window.mean_power_w == pytest.approx(500.0, rel=0.01)
    assert both.describe()["uuids"] == ["GPU-00000000:81:00.0", "GPU-00000000:01:00.0"]


def test_waiting_for_a_second_gpus_tick_is_in_the_bound(clock):
    gpus = [FakeGpu(clock, "00000000:01:00.0", phase_s=0.0), FakeGpu(clock, "00000000:02:00.0", phase_s=0.09)]
    for gpu in gpus:
        gpu.set_power(5.0)
    window = measure(open_fake(clock, *gpus), clock, 1.0, gpus, busy_w=500.0)
    assert abs(window.mean_power_w / 1000.0 - 1) <= window.error_bound


def test_mig_slice_is_unavailable(clock):
    gpu = FakeGpu(clock)
    gpu.mig = True
    window = measure(open_fake(clock, gpu), clock, 1.0)
    assert window.energy_j is None and "MIG" in window.reason


def test_a_gpu_too_old_for_mig_is_no_slice(clock):
    gpu = FakeGpu(clock)
    gpu.lacks["mig"] = "Not Supported"
    assert measure(open_fake(clock, gpu), clock, 1.0).reason is None


@pytest.mark.parametrize(
    "pids, void",
    [([], False), ([os.getpid()], False), ([os.getpid(), 7], True), ([7], False), ([7, 8], True)],
    ids=["none listed", "us", "us and another", "one of another pid namespace", "two of another pid namespace"],
)
def test_another_process_on_the_device_voids_the_window(clock, pids, void):
    gpu = FakeGpu(clock)
    gpu.processes = pids
    window = measure(open_fake(clock, gpu), clock, 1.0)
    assert (window.energy_j is None) == void
    assert not void or "1 other process" in window.reason


def test_slowdown_between_the_edges_voids_the_window(clock):
    gpu = FakeGpu(clock)
    reader = open_fake(clock, gpu)
    reader.start()
    clock.sleep(0.5)
    gpu.throttle = FakeNvml.nvmlClocksEventReasonSwThermalSlowdown
    reader.sample()
    gpu.throttle = 0
    clock.sleep(0.5)
    assert reader.stop().reason == "thermal slowdown"
    assert measure(reader, clock, 1.0).reason is None  # the next window starts clean


def test_running_at_the_power_limit_is_recorded_and_voids_nothing(clock):
    gpu = FakeGpu(clock)
    gpu.throttle = FakeNvml.nvmlClocksEventReasonSwPowerCap
    reader = open_fake(clock, gpu)
    assert measure(reader, clock, 1.0).reason is None
    assert reader.describe()["power_capped"] == [True]


def test_superchip_counters_cover_the_module(clock):
    gpu = FakeGpu(clock, name="NVIDIA GH200 480GB")
    assert measure(open_fake(clock, gpu), clock, 1.0).scope == "module"


def test_sample_sums_over_devices_and_leaves_out_what_is_refused(clock):
    gpus = [FakeGpu(clock, f"00000000:0{i}:00.0", watts=100.0 * i) for i in (1, 2)]
    reader = open_fake(clock, *gpus)
    clocks = {"clock_mhz": 1980.0, "power_capped": 0.0}
    assert reader.sample() == {"power_w": 300.0, "memory_bytes": 40 * 10**9, "utilisation": 0.9} | clocks
    gpus[1].lacks.update(memory="Not Supported", utilisation="Not Supported")
    assert reader.sample() == {"power_w": 300.0, "memory_bytes": None, "utilisation": None} | clocks


def test_windows_do_not_nest(clock):
    for reader in (open_fake(clock, FakeGpu(clock)), energy.open_reader(jax.local_devices())):
        with pytest.raises(RuntimeError, match="start"):
            reader.stop()
        reader.start()
        with pytest.raises(RuntimeError, match="open"):
            reader.start()


def test_windows_of_all_processes_are_summed_over_the_longest():
    a = energy.EnergyWindow(400.0, 200.0, 2.0, "nvml energy counter", "gpu", "measured", 0.01, None)
    b = dataclasses.replace(a, energy_j=1000.0, mean_power_w=400.0, duration_s=2.5, error_bound=0.02)
    both = energy.sum_over_processes([a, b])
    assert (both.energy_j, both.duration_s, both.mean_power_w) == (1400.0, 2.5, 560.0)
    assert energy.sum_over_processes([a]) == a
    assert energy.sum_over_processes([a, dataclasses.replace(b, energy_j=None, reason="a reset")]).reason == "a reset"
    assert "different" in energy.sum_over_processes([a, dataclasses.replace(b, scope="module")]).reason


def test_combined_windows_add_energy_and_one_void_part_voids_the_whole(clock):
    gpu = FakeGpu(clock, watts=200.0)
    reader = open_fake(clock, gpu)
    windows = [measure(reader, clock, seconds) for seconds in (1.0, 3.0)]
    whole = energy.combine_windows(windows)
    assert whole.duration_s == pytest.approx(4.0) and whole.energy_j == pytest.approx(800.0, rel=0.02)
    assert windows[1].error_bound < whole.error_bound < windows[0].error_bound
    gpu.processes = [os.getpid(), 7]
    assert energy.combine_windows([*windows, measure(reader, clock, 1.0)]).energy_j is None
    assert energy.combine_windows([]).reason == "no finished work was measured"


def test_a_cpu_has_no_reading_and_says_why():
    reader = energy.open_reader(jax.local_devices())
    with reader.window() as window:
        pass
    assert window.result.energy_j is None and window.result.kind == "unavailable"
    assert reader.sample() == {"power_w": None, "memory_bytes": None, "utilisation": None}


@pytest.mark.parametrize("readable, message", [(True, "zeus"), (False, "sudo chmod a+r")])
def test_rapl_gives_the_one_line_fix(monkeypatch, readable, message):
    monkeypatch.setattr(energy.glob, "glob", lambda _: ["/sys/class/powercap/intel-rapl:0/energy_uj"])
    monkeypatch.setattr(energy.os, "access", lambda *_: readable)
    assert message in energy.open_reader(jax.local_devices()).reason


def test_without_a_driver_the_reader_says_so():
    """True of any machine without an NVIDIA driver: a GPU that is not NVIDIA's takes the same way."""
    if os.path.exists("/proc/driver/nvidia"):
        pytest.skip("this machine has an NVIDIA driver")
    reader = energy.open_reader(jax_devices(1))
    assert reader.kind == "unavailable" and "NVML does not start" in reader.reason
    with pytest.raises(nvml.NvmlUnavailable, match="PCI id"):
        nvml.pci_bus_ids([types.SimpleNamespace(local_hardware_id=0)])


def test_pci_ids_come_from_the_cuda_driver_by_jax_ordinal(monkeypatch):
    ids = {0: b"00000000:81:00.0", 1: b"00000000:01:00.0"}  # CUDA_VISIBLE_DEVICES turned the two around

    class Cuda:
        def cuInit(self, flags):
            return 0

        def cuDeviceGet(self, device, ordinal):
            device._obj.value = 40 + ordinal
            return 0 if ordinal in ids else 101

        def cuDeviceGetPCIBusId(self, text, length, device):
            text.value = ids[device.value - 40]
            return 0

    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda _: Cuda())
    assert nvml.pci_bus_ids(jax_devices(2)) == ["00000000:81:00.0", "00000000:01:00.0"]
    with pytest.raises(nvml.NvmlUnavailable, match="device 2: error 101"):
        nvml.pci_bus_ids(jax_devices(3))
