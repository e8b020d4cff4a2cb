"""CPU time counters of the kernel: busy, idle, stolen, waited and throttled time of the usable cores.

Linux only; None where a counter is unavailable. Times are in s, summed over the cores that this process may use.
"""

import glob
import os
import resource
import time
import typing
from pathlib import Path

from efficientllm.metrics import host

TICK_S = 1 / (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)


def read_counters() -> dict[str, typing.Any]:
    """Reads all counters now, `{name: number, None or {thread: s}}`; see `conditions.span_between`."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    busy, idle, steal = _cores()
    return {
        "at": time.perf_counter(),
        "cpu_s": host.cpu_seconds(),
        "voluntary": usage.ru_nvcsw,
        "involuntary": usage.ru_nivcsw,
        "busy_s": busy,
        "idle_s": idle,
        "steal_s": steal,
        "waited_s": run_delays(),
        "throttled_s": _throttled(),
        "pressure_s": _pressure(),
        "overheated": _overheated(),
    }


def _cores():
    """Busy, idle and stolen time of the usable cores."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None, None, None
    usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [[int(field) for field in line.split()[1:]] for line in lines if line.split(" ", 1)[0] in usable]
    if not rows or min(map(len, rows)) < 8:
        return None, None, None
    user, nice, system, idle, iowait, irq, softirq, steal = (sum(row[i] for row in rows) * TICK_S for i in range(8))
    return user + nice + system + irq + softirq, idle + iowait, steal


def run_delays() -> dict[str, float] | None:
    """Run-queue delay of each thread of this process, `{thread: s}`: time in which it was runnable but not running."""
    delays = {}
    for file in glob.glob("/proc/self/task/*/schedstat"):
        try:
            delays[file] = int(Path(file).read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # the thread has ended
            continue
    return delays or None


def _throttled():
    """Time in which the CPU quota of the cgroup (a container's CPU limit) throttled threads."""
    for file, key, unit in _cgroup_files():
        try:
            fields = dict(line.split() for line in Path(file).read_text().splitlines())
            return int(fields[key]) * unit
        except (OSError, KeyError, ValueError):
            continue
    return None


def _cgroup_files():
    """Candidate paths of the cgroup's cpu.stat (v2 and v1), with the key and unit of its throttled time."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            for folder in (f"/sys/fs/cgroup{path}", "/sys/fs/cgroup"):
                yield f"{folder}/cpu.stat", "throttled_usec", 1e-6
        elif "cpu" in controllers.split(","):
            for folder in (f"/sys/fs/cgroup/cpu{path}", "/sys/fs/cgroup/cpu"):
                yield f"{folder}/cpu.stat", "throttled_time", 1e-9


def _pressure():
    """Time in which at least one task on the machine waited for a core (PSI, `some`)."""
    try:
        line = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        return int(line.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return None


def _overheated():
    """Count of thermal throttling events of the cores."""
    files = glob.glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    try:
        return sum(int(Path(file).read_text()) for file in files) if files else None
    except (OSError, ValueError):
        return None


def clock_mhz() -> float | None:
    """Mean clock of the usable cores now in MHz, or None."""
    paths = [f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in os.sched_getaffinity(0)]
    try:
        return sum(int(Path(path).read_text()) for path in paths) / len(paths) / 1e3
    except (OSError, ValueError):
        return None


def load_average() -> float | None:
    """The load average of the last minute, or None."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def power_source() -> str | None:
    """`battery` while a battery discharges, else `mains`; None where the system does not say."""
    states = []
    for file in glob.glob("/sys/class/power_supply/*/status"):
        try:
            states.append(Path(file).read_text().strip())
        except OSError:
            continue
    if not states:
        return None
    return "battery" if "Discharging" in states else "mains"
