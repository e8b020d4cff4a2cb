"""Memory, cores and CPU time of this process and its host, read with the standard library.

In a run on the CPU the host is the device: its resident memory and CPU time are the study's AMU and PCU.
"""

import functools
import hashlib
import os
import platform
import resource
import sys
import time
from pathlib import Path

from efficientllm.metrics import cgroups


def name_hash() -> str:
    """Hash of the host name, 12 hexadecimal digits: rows distinguish machines without naming them."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process in bytes; 0 if the process has ended.

    Without /proc (macOS): the peak of this process, which is an upper bound, and 0 for any other process.
    """
    try:
        pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return peak_rss_bytes() if pid == "self" else 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes, from the kernel's counter: sampling would miss short peaks."""
    # VmHWM, not ru_maxrss: a process inherits ru_maxrss across exec from its parent.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_total_bytes() -> int:
    """Physical memory of the machine, or the memory limit of the surrounding container if that is smaller."""
    return min([physical_bytes(), *(limit for limit, _ in _limits())])


def physical_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _limits():
    return tuple(cgroups.memory_limits())


def memory_free_bytes(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still allocate within the machine and its containers; page cache counts as free."""
    return min([_available(proc), *(free for _, free in cgroups.memory_limits(proc, cgroup_root))])


def _available(proc):
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return physical_bytes()


def usable_cores() -> int:
    """Cores that this process may run on; taskset, a cpuset or Slurm may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_seconds() -> float:
    """CPU time (user and system) of all threads of this process since it began."""
    return time.process_time()
