"""Hardware by name: its figures with their sources, and compile-only devices of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax

from efficientllm.cost import device_peaks
from efficientllm.cost.hardware_table import find_hardware, read_table
from efficientllm.errors import UserError
from efficientllm.metrics import host
from efficientllm.metrics.reading import Reading, missing
from efficientllm.runtime import optional_packages
from efficientllm.typing import Record

# By platform: the module that has its compiler, and the extra of setup.py that installs it.
PLUGINS = {"gpu": ("jax_cuda13_plugin", "gpu"), "tpu": ("libtpu", "tpu")}
CPU_DEVICES = 1024  # XLA's client allows 2,048 a process
# Without these, the plugins wait for a device or refuse to load.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device. Bandwidths are a device's, one way, in byte/s.

    link:    between the devices of a host (of a slice, for TPUs); 0 where devices share a memory.
    network: between hosts; None where there are none.
    facts:   the remaining keys of the table's entry, mostly for the compiler.
    """

    name: str
    platform: str
    device_kind: str
    memory_bytes: int
    tdp_w: float | None
    per_host: int | None
    link: float
    network: float | None
    sources: dict[str, str]
    facts: Record

    def peak_flops(self, dtype: str) -> Reading:
        """Dense peak of a device for a compute dtype in FLOP/s, as a Reading; measured on a CPU."""
        if self.platform == "cpu":
            return device_peaks.measure_gemm_peak(dtype)
        dtype = "tf32" if (dtype, self.platform) == ("float32", "gpu") else dtype
        if flops := self.facts.get("flops"):  # only hardware from a user's own file has these
            peak = flops.get(dtype)
            return Reading(peak, "FLOP/s", self.name) if peak else missing("FLOP/s", f"{self.name}: no {dtype} peak")
        return device_peaks.peak_flops(self.device_kind, dtype)

    def bandwidth(self) -> Reading:
        """Peak memory bandwidth of a device in byte/s, as a Reading."""
        if self.platform == "cpu":
            return device_peaks.measure_copy_bandwidth()
        if "flops" in self.facts:
            return Reading(self.facts["bandwidth"], "byte/s", self.name)
        return device_peaks.peak_bandwidth(self.device_kind)

    @property
    def kernel_s(self) -> float | None:
        """Least seconds a kernel launch, for kernels in sequence; None where not measured."""
        return self.facts.get("kernel_s")

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability `(major, minor)` of a GPU; (0, 0) for other hardware."""
        return tuple(self.facts.get("compute_capability", (0, 0)))

    @property
    def plugin(self) -> tuple[str, str] | None:
        """`(module, extra)` of the compiler; None where JAX itself has it (CPUs)."""
        return PLUGINS.get(self.platform)

    @property
    def has_compiler(self) -> bool:
        return self.lacks is None

    @property
    def lacks(self) -> str | None:
        """Why this process cannot compile for it and what to install, or None."""
        if self.plugin is None:
            return None
        if self.platform == "gpu" and "cores" not in self.facts:
            return f"a compiler would have to be told more of {self.name} than is known (cores, caches, clocks)"
        module, extra = self.plugin
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed, the compiler for {self.name}: {optional_packages.remedy(extra)}"
        return None


def find(name: str, count: int) -> Hardware:
    """Finds the Hardware of `config.plan.hardware`; a unique prefix of a name such as `h100` is enough.

    On a CPU, `count` devices share the host's memory. Raises UserError listing the known names.
    """
    name, facts = find_hardware(name, "config.plan.hardware")
    if facts["platform"] == "cpu":
        facts |= {"memory_bytes": host.memory_total_bytes() // count}
    fields = [field.name for field in dataclasses.fields(Hardware) if field.name not in ("name", "facts", "link")]
    values = {key: facts.pop(key, None) for key in fields}
    return Hardware(name=name, link=facts.pop("link", 0), facts=facts, **values)


def check_count(hardware: Hardware, count: int) -> None:
    """Raises UserError for a number of devices in which the hardware is not built."""
    where = f"config.plan.devices = {count}"
    if count < 1:
        raise UserError(f"{where}: must be at least 1")
    if hardware.platform == "cpu" and count > CPU_DEVICES:
        raise UserError(f"{where}: a process has at most {CPU_DEVICES:,} devices of a CPU")
    sizes = hardware.facts.get("topologies")
    if sizes and str(count) not in sizes:
        raise UserError(f"{where}: slices of {hardware.name} have {', '.join(sizes)} chips")
    if hardware.network and count > hardware.per_host and count % hardware.per_host:
        raise UserError(
            f"{where}: hosts of {hardware.name} have {hardware.per_host} devices; "
            f"{count + -count % hardware.per_host} would do"
        )
    if not hardware.network and hardware.per_host and count > hardware.per_host:
        raise UserError(f"{where}: no network of {hardware.name} is known; at most the {hardware.per_host} of a host")


def hosts(hardware: Hardware, count: int) -> int:
    """Number of hosts of `count` devices."""
    return 1 if not hardware.network else max(1, count // hardware.per_host)


def compile_only(hardware: Hardware, count: int) -> None:
    """Configures this process to compile for absent hardware. Call before JAX initializes its devices."""
    if hardware.plugin and hardware.has_compiler:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    if "JAX_PLATFORMS" not in os.environ:  # a plan must not occupy an accelerator
        jax.config.update("jax_platforms", "cpu")
    if hardware.platform == "cpu" or not hardware.has_compiler:
        with contextlib.suppress(RuntimeError):  # the devices are initialized already
            jax.config.update("jax_num_cpu_devices", count)


def _host_devices(count):
    """`count` CPU devices of this process, as targets or as placeholders in a mesh. Raises UserError."""
    cpus = jax.devices("cpu")
    if len(cpus) < count:
        raise UserError(f"config.plan.devices = {count}: this process has {len(cpus)} CPU devices already")
    return cpus[:count]


def devices(hardware: Hardware, count: int) -> list[jax.Device]:
    """`count` compile-only devices; CPU devices as placeholders where the compiler is not installed."""
    if hardware.platform == "cpu" or not hardware.has_compiler:
        return _host_devices(count)
    from jax.experimental import topologies

    if hardware.platform == "tpu":
        name = hardware.facts["topologies"][str(count)]
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    per_host = min(count, hardware.per_host)
    options = {"topology": f"1x{hosts(hardware, count)}x{per_host}", "target_config": target_config(hardware)}
    return list(topologies.get_topology_desc(platform="cuda", topology_name=hardware.name, **options).devices)


def target_config(hardware: Hardware) -> str:
    """Describes a GPU to XLA: the text form of a `GpuTargetConfigProto`."""
    facts, common = hardware.facts, read_table()["gpu"]
    x, y, z = common["block_dim_limit"]
    major, minor = facts["compute_capability"]
    feature = "feature_extension: ACCELERATED_FEATURES" if facts["accelerated_features"] else ""
    counts: tuple[str, ...] = (
        "threads_per_block_limit",
        "threads_per_warp",
        "shared_memory_per_block",
        "threads_per_core_limit",
    )
    counts += ("fpus_per_core", "registers_per_core_limit", "registers_per_block_limit")
    cudnn = " ".join(f"{key}: {value}" for key, value in zip(("major", "minor", "patch"), common["cudnn"], strict=True))
    return (
        f"gpu_device_info {{ {' '.join(f'{key}: {facts.get(key, common[key])}' for key in counts)} "
        f"shared_memory_per_core: {facts['shared_per_core']} core_count: {facts['cores']} "
        f"block_dim_limit_x: {x} block_dim_limit_y: {y} block_dim_limit_z: {z} "
        f"memory_bandwidth: {facts['bandwidth']} l2_cache_size: {facts['l2_bytes']} "
        f"clock_rate_ghz: {facts['clock_ghz']} "
        f"device_memory_size: {hardware.memory_bytes} shared_memory_per_block_optin: {facts['shared_optin']} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} {feature} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {cudnn} }} device_description_str: "{hardware.device_kind}"'
    )


def link_bandwidth(hardware: Hardware, group: Sequence[int]) -> Reading:
    """One-way bandwidth of each device in a ring over the devices `group` (their indices), in byte/s, as a Reading.

    Across hosts the network limits the ring. It leaves each host once, so it may use the network adapters of all the
    group's devices on that host.
    """
    per_host = hardware.per_host or max(group) + 1
    on_hosts: dict[int, int] = {}
    for device in group:
        on_hosts[device // per_host] = on_hosts.get(device // per_host, 0) + 1
    if len(on_hosts) == 1 or not hardware.network:
        return Reading(hardware.link, "byte/s", hardware.sources.get("link", "devices of one memory"))
    network = hardware.network * min(on_hosts.values())
    if network > hardware.link:
        return Reading(hardware.link, "byte/s", hardware.sources["link"])
    return Reading(network, "byte/s", hardware.sources["network"])
