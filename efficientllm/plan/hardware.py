"""Hardware by name: its figures with their sources, and devices of it that can only be compiled for."""

import contextlib
import dataclasses
import importlib.util
import os

import jax

from efficientllm.cost import device_peaks
from efficientllm.cost.hardware_table import find_hardware, read_table
from efficientllm.errors import UserError
from efficientllm.metrics import host
from efficientllm.metrics.reading import Reading, missing
from efficientllm.runtime import optional_packages

# By platform: the module that shows its compiler is there, and the extra of setup.py that brings it.
PLUGINS = {"gpu": ("jax_cuda13_plugin", "gpu"), "tpu": ("libtpu", "tpu")}
CPU_DEVICES = 1024  # XLA's client has numbers for 2,048 of a process
# Without a device, the plugins would wait for one or refuse to load.
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
    facts:   the rest of the table's entry: what a compiler wants to be told.
    """

    name: str
    platform: str
    device_kind: str
    memory_bytes: int
    tdp_w: float | None
    per_host: int | None
    link: float
    network: float | None
    sources: dict
    facts: dict

    def peak_flops(self, dtype):
        """Dense peak of a device at a compute dtype in FLOP/s, as a Reading; the host's share on a CPU."""
        if self.platform == "cpu":
            return device_peaks.measure_gemm_peak(dtype)
        dtype = "tf32" if (dtype, self.platform) == ("float32", "gpu") else dtype
        if flops := self.facts.get("flops"):  # of a file of the user's
            known = flops.get(dtype)
            return Reading(known, "FLOP/s", self.name) if known else missing("FLOP/s", f"{self.name}: no {dtype} peak")
        return device_peaks.peak_flops(self.device_kind, dtype)

    def bandwidth(self):
        """Peak memory bandwidth of a device in byte/s, as a Reading."""
        if self.platform == "cpu":
            return device_peaks.measure_copy_bandwidth()
        if "flops" in self.facts:
            return Reading(self.facts["bandwidth"], "byte/s", self.name)
        return device_peaks.peak_bandwidth(self.device_kind)

    @property
    def kernel_s(self):
        """Seconds that a kernel takes at least, one after another; None where it has not been measured."""
        return self.facts.get("kernel_s")

    @property
    def capability(self):
        """The compute capability `(major, minor)` of a GPU; (0, 0) of what is none."""
        return tuple(self.facts.get("compute_capability", (0, 0)))

    @property
    def plugin(self):
        """`(module, extra)` of the compiler, or None where every installation has it."""
        return PLUGINS.get(self.platform)

    @property
    def has_compiler(self):
        return self.lacks is None

    @property
    def lacks(self):
        """Why nothing can be compiled for it here and what to do, or None."""
        if self.plugin is None:
            return None
        if self.platform == "gpu" and "cores" not in self.facts:
            return f"a compiler would have to be told more of {self.name} than is known (cores, caches, clocks)"
        module, extra = self.plugin
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed, the compiler for {self.name}: {optional_packages.remedy(extra)}"
        return None


def find(name, count):
    """The Hardware of `config.plan.hardware`; a beginning that only one name has will do, as `h100`.

    `count` devices share the memory of a CPU's host. Raises UserError listing the known names.
    """
    name, facts = find_hardware(name)
    if facts["platform"] == "cpu":
        facts |= {"memory_bytes": host.memory_total_bytes() // count}
    fields = [field.name for field in dataclasses.fields(Hardware) if field.name not in ("name", "facts", "link")]
    own = {key: facts.pop(key, None) for key in fields}
    return Hardware(name=name, link=facts.pop("link", 0), facts=facts, **own)


def check_count(hardware, count):
    """Raises UserError for a number of devices that the hardware does not come in."""
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


def hosts(hardware, count):
    """How many hosts `count` devices are on."""
    return 1 if not hardware.network else max(1, count // hardware.per_host)


def compile_only(hardware, count):
    """Readies this process to compile for what is not here. Call before the first use of a device."""
    if hardware.plugin and hardware.has_compiler:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    if "JAX_PLATFORMS" not in os.environ:  # a plan takes no accelerator, nor memory of one
        jax.config.update("jax_platforms", "cpu")
    if hardware.platform == "cpu" or not hardware.has_compiler:
        with contextlib.suppress(RuntimeError):  # this process has its devices already
            jax.config.update("jax_num_cpu_devices", count)


def _host_devices(count):
    """`count` CPU devices of this process: to describe a mesh with, and to compile for. Raises UserError."""
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(f"config.plan.devices = {count}: this process has {len(found)} CPU devices already")
    return found[:count]


def devices(hardware, count):
    """`count` devices that can be compiled for; CPU devices in their place where the compiler is not installed."""
    if hardware.platform == "cpu" or not hardware.has_compiler:
        return _host_devices(count)
    from jax.experimental import topologies

    if hardware.platform == "tpu":
        name = hardware.facts["topologies"][str(count)]
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    each = min(count, hardware.per_host)
    options = {"topology": f"1x{hosts(hardware, count)}x{each}", "target_config": target_config(hardware)}
    return list(topologies.get_topology_desc(platform="cuda", topology_name=hardware.name, **options).devices)


def target_config(hardware):
    """A GPU as XLA wants it described: the text form of its `GpuTargetConfigProto`."""
    own, common = hardware.facts, read_table()["gpu"]
    x, y, z = common["block_dim_limit"]
    major, minor = own["compute_capability"]
    feature = "feature_extension: ACCELERATED_FEATURES" if own["accelerated_features"] else ""
    counts = ("threads_per_block_limit", "threads_per_warp", "shared_memory_per_block", "threads_per_core_limit")
    counts += ("fpus_per_core", "registers_per_core_limit", "registers_per_block_limit")
    cudnn = " ".join(f"{key}: {value}" for key, value in zip(("major", "minor", "patch"), common["cudnn"], strict=True))
    return (
        f"gpu_device_info {{ {' '.join(f'{key}: {own.get(key, common[key])}' for key in counts)} "
        f"shared_memory_per_core: {own['shared_per_core']} core_count: {own['cores']} "
        f"block_dim_limit_x: {x} block_dim_limit_y: {y} block_dim_limit_z: {z} "
        f"memory_bandwidth: {own['bandwidth']} l2_cache_size: {own['l2_bytes']} clock_rate_ghz: {own['clock_ghz']} "
        f"device_memory_size: {hardware.memory_bytes} shared_memory_per_block_optin: {own['shared_optin']} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} {feature} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {cudnn} }} device_description_str: "{hardware.device_kind}"'
    )


def link_bandwidth(hardware, group):
    """byte/s one way of a device among the devices `group` (their numbers), as a Reading.

    A group on several hosts is held up by the network: its members of one host share that host's adapters, and a ring
    crosses between two hosts once in each.
    """
    per_host = hardware.per_host or max(group) + 1
    on_hosts = {}
    for device in group:
        on_hosts[device // per_host] = on_hosts.get(device // per_host, 0) + 1
    if len(on_hosts) == 1 or not hardware.network:
        return Reading(hardware.link, "byte/s", hardware.sources.get("link", "devices of one memory"))
    shared = hardware.network * min(on_hosts.values())
    if shared > hardware.link:
        return Reading(hardware.link, "byte/s", hardware.sources["link"])
    return Reading(shared, "byte/s", hardware.sources["network"])
