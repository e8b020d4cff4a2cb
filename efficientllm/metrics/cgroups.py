"""Memory limits of this process's control groups (cgroup v1 and v2), which containers and Slurm set."""

import contextlib
import pathlib

_UNLIMITED = 2**60  # cgroup v1 writes a huge page count where there is no limit
# (limit file, usage file, fields of memory.stat that the kernel can reclaim)
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def memory_limits(
    proc: pathlib.Path = pathlib.Path("/proc"), root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """`[(limit, free)]` in bytes for each enclosing group that has a limit; its page cache counts as free."""
    limits = []
    for folder, kind in _groups(proc, root):
        limit_file, used_file, reclaimable = kind
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limit = int((folder / limit_file).read_text())
            if limit < _UNLIMITED:
                used = int((folder / used_file).read_text()) - _cache(folder, reclaimable)
                limits.append((limit, max(0, limit - max(0, used))))
    return limits


def _groups(proc, root):
    """`(folder, files)` of this process's group and all its ancestors, in each mounted hierarchy."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0":
            bases, kind = (root, root / "unified"), _V2
        elif "memory" in controllers.split(","):
            bases, kind = (root / "memory", root / controllers), _V1
        else:
            continue
        base = next((base for base in bases if (base / kind[0]).exists() or any(base.glob("*/" + kind[0]))), bases[0])
        inner = pathlib.PurePosixPath(path.lstrip("/"))
        # In a container /proc may show the host's path while only the container's group is mounted: try every ancestor.
        for folder in {str(inner), *map(str, inner.parents)}:
            yield base / folder, kind


def _cache(folder, fields):
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = dict(line.split(" ", 1) for line in lines)
        return sum(int(stat.get(field, 0)) for field in fields)
    except (OSError, ValueError):
        return 0
