"""Memory limits of the control groups that this process is in (cgroup v1 and v2), as containers and Slurm set them."""

import contextlib
import pathlib

_UNLIMITED = 2**60  # cgroup v1 writes the largest page count for none
# (file of the limit, of the use, fields of memory.stat that the kernel takes back when memory is short)
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def limits(proc=pathlib.Path("/proc"), root=pathlib.Path("/sys/fs/cgroup")):
    """`[(limit, free)]` in bytes of each group around this process that has a limit; free counts its page cache."""
    found = []
    for folder, kind in _groups(proc, root):
        limit_file, used_file, reclaimable = kind
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limit = int((folder / limit_file).read_text())
            if limit < _UNLIMITED:
                used = int((folder / used_file).read_text()) - _cache(folder, reclaimable)
                found.append((limit, max(0, limit - max(0, used))))
    return found


def _groups(proc, root):
    """`(folder, files)` of the group of each hierarchy and all groups around it, as far as they are mounted here."""
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
        # In a container the path may be that of the machine, of which only the container's own group is mounted.
        for part in {str(inner), *map(str, inner.parents)}:
            yield base / part, kind


def _cache(folder, fields):
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = dict(line.split(" ", 1) for line in lines)
        return sum(int(stat.get(field, 0)) for field in fields)
    except (OSError, ValueError):
        return 0
