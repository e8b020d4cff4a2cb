"""Runs golden cases in a process of fixed flags, and reads their stored values."""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import jax

from golden import cases

ROOT = pathlib.Path(__file__).parents[2]
MARK = "---- golden case "  # begins the line before what a case prints
FOLDER = pathlib.Path(__file__).parent / "data"
# One device, one thread a product, AVX2 whatever the machine has besides, and no optimiser: the same bits on every CPU
# with the same caches, for XLA's products sum in blocks that fit them. Intel's, as far as seen, give the same bits.
XLA_FLAGS = (
    "--xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def conditions():
    """What the bits depend on, as a key of the stored numbers: jax's minor version, the CPU, what setup.py built."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    names = {"AuthenticAMD": f"AuthenticAMD with caches of {_cache_sizes()}", "GenuineIntel": "GenuineIntel"}
    vendors = [name for vendor, name in names.items() if vendor in flags]
    instructions = ", ".join(["AVX2", *vendors]) if {"avx2", "fma"} <= set(flags) else platform.machine()
    native = "" if any((ROOT / "efficientllm").rglob("_products*.so")) else ", no native products"
    return f"jax {'.'.join(jax.__version__.split('.')[:2])}, {instructions}{native}"


def _cache_sizes():
    """The sizes of a core's caches of data, from the first level on, as Linux writes them."""
    folders = sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    of_data = [folder for folder in folders if (folder / "type").read_text().strip() != "Instruction"]
    return " ".join((folder / "size").read_text().strip() for folder in of_data)


def observe(names=cases.NAMES):
    """`{name: what came of the case}`; plans are made in a process of their own, for they choose its devices."""
    together = [[name for name in names if name != "plan"], [name for name in names if name == "plan"]]
    with tempfile.TemporaryDirectory(prefix="efficientllm-golden-") as folder:
        started = [_start(group, pathlib.Path(folder) / str(i)) for i, group in enumerate(together) if group]
        return {name: case for process, out in started for name, case in _finish(process, out).items()}


def _start(names, folder):
    """`(process that runs the cases, file that it writes)`."""
    folder.mkdir()
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": os.pathsep.join(paths)}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    settings |= {"EFFICIENTLLM_CACHE": os.environ.get("EFFICIENTLLM_CACHE", str(folder / "cache"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "golden.observe", str(folder / "observed.json"), *names],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, folder / "observed.json"


def _finish(process, out):
    """What the cases of a process gave; one that failed has what it printed."""
    printed, _ = process.communicate(timeout=900)
    if process.returncode:
        raise RuntimeError(f"the golden cases ended with status {process.returncode}:\n{printed[-4000:]}")
    numbers = json.loads(out.read_text())
    for name, case in numbers.items():
        if "failed" in case:
            case["failed"] += printed.partition(f"{MARK}{name}\n")[2].partition(MARK)[0][-4000:]
    return numbers


def stored(name):
    """`{"structure": ..., "numbers": {conditions: ...}}`, empty where nothing is stored."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"structure": None, "numbers": {}}
