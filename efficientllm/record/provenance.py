"""Provenance of a row: code, versions, devices, settings and time; null where the machine does not tell."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import typing
import uuid
from pathlib import Path

import jax

from efficientllm.metrics import cpu_counters, host, memory
from efficientllm.runtime import cpuinfo
from efficientllm.typing import Mesh, PathLike

PACKAGES = (
    "efficientllm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "datasets",
    "tokenizers",
)


def provenance(
    *,
    reader: typing.Any,
    started: float,
    ended: float,
    config_hash: str | None = None,
    seed: int | None = None,
    mesh: Mesh | None = None,
    kernels: dict[str, typing.Any] | None = None,
) -> dict[str, typing.Any]:
    """Provenance of a run as plain data.

    `reader` is the energy reader (it knows UUIDs, driver, clocks and power limit); `started` and `ended` are Unix
    times in s; `mesh` a `jax.sharding.Mesh`; `kernels` says `xla`, `cudnn`, `pallas` or `ffi` per technique.
    """
    devices = jax.devices()
    return {
        "run": uuid.uuid4().hex,  # identifies copies of the row
        "config_hash": config_hash,
        "seed": seed,
        "git": git_state(),
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "host": {
            "name_hash": host.name_hash(),
            "os": platform.platform(),
            "processor": processor(),
            "power_source": cpu_counters.power_source(),
        },
        "devices": {
            "platform": devices[0].platform,
            "runtime": devices[0].client.platform_version,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            "energy_sources_passed_over": list(reader.passed_over),
            **dict.fromkeys(("uuids", "pci_bus_ids", "power_limit_w", "power_capped", "clocks_mhz", "driver", "cuda")),
            **reader.describe(),
        },
        "allocator": memory.allocator_settings(devices),
        "mesh": None if mesh is None else dict(mesh.shape),
        "kernels": kernels,
        "started": _iso(started),
        "ended": _iso(ended),
    }


def summary() -> dict[str, typing.Any]:
    """Short provenance for scripts that write no row: date, code, device, versions and the machine's load."""
    host_processor = processor()
    return {
        "date": datetime.date.today().isoformat(),
        **git_state(),
        "device": jax.devices()[0].device_kind,
        "processor": host_processor["name"],
        "cores": host_processor["cores"],
        "load": os.getloadavg()[0],
        "versions": versions(),
    }


def git_state(folder: PathLike | None = None, without: str = "") -> dict[str, typing.Any]:
    """`{"commit": hash, "dirty": bool}` of the repository that holds `folder` (this package); nulls outside of one.

    Untracked files do not count as dirty: a run writes such files itself. Neither do files below `without`, a path
    from the top of the repository.
    """
    folder = folder or Path(__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    paths = ("--", ":(top)", f":(top,exclude){without}") if without else ()
    changes = None if commit is None else _git(folder, "status", "--porcelain", "--untracked-files=no", *paths)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder, *arguments):
    try:
        run = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Version of Python and of each of PACKAGES, null for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, typing.Any]:
    """Name and model of the CPU, and the cores that this process may use.

    `model` is vendor, family, model and stepping: on virtual machines many CPUs have the same name.
    """
    facts = cpuinfo.first_processor()
    ids = [facts[key] for key in ("vendor_id", "cpu family", "model", "stepping") if key in facts]
    name = facts.get("model name") or platform.processor()
    return {"name": name or None, "model": "/".join(ids) or None, "cores": host.usable_cores()}


def _iso(unix_s):
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat(timespec="seconds")
