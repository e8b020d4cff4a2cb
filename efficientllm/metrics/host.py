"""What the operating system says of this process and its machine, from the standard library alone.

On a CPU the host is the device: its resident memory and CPU time are the study's AMU and PCU.
"""

import functools
import hashlib
import os
import platform
import resource
import sys
import time
from pathlib import Path

from efficientllm.metrics import containers


def name_hash():
    """The machine's name as 12 hexadecimal digits: rows tell machines apart and name none."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def rss_bytes(pid="self"):
    """Bytes of a process resident in memory now, 0 for one that is gone; where there is no /proc (macOS) the peak of
    this process, an upper bound, and 0 of another."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return peak_rss_bytes() if pid == "self" else 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes():
    """Largest resident size since this program began: a kernel counter, so no peak falls between two looks.

    VmHWM rather than `ru_maxrss`, which a process inherits across exec from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_total_bytes():
    """Physical memory of the machine, or of the container that this process is in where that may take less."""
    return min([physical_bytes(), *(limit for limit, _ in _limits())])


def physical_bytes():
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _limits():
    return tuple(containers.limits())


def memory_free_bytes(proc=Path("/proc"), cgroups=Path("/sys/fs/cgroup")):
    """Memory that a process could still take, page cache counted as free: of the machine, and of each container."""
    return min([_available(proc), *(free for _, free in containers.limits(proc, cgroups))])


def _available(proc):
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return physical_bytes()


def usable_cores():
    """Cores this process may run on: fewer than the machine's under taskset, a cpuset or Slurm."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_seconds():
    """CPU time (user and system) of all threads of this process since it began."""
    return time.process_time()
