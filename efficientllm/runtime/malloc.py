"""Allocator of a run on CPUs: returning freed memory, and keeping XLA's scratch memory from one step to the next.

Without glibc on Linux both do nothing.
"""

import ctypes
import os
import pathlib
import platform
import sys

TUNABLES = "GLIBC_TUNABLES"
PRELOADED = "LD_PRELOAD"
LIBRARIES = pathlib.Path(__file__).parents[1] / "ops" / "native"
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_KEPT = f"glibc.malloc.trim_threshold={2**40}"  # nothing is returned but by `trim`
# Threads that share an arena wait for each other. With two arenas a step of 1 ms took 1.3 times as long as with glibc's
# own limit (with four 1.2, with eight 1.04), and in two runs each steps of 60 ms were alike; the base config's peak
# memory was 0.36 GB instead of 0.27 and 0.32 (an Intel Xeon with AMX, 2 cores, 2026-12-01). Without the library a
# second arena would hold scratch memory twice.
_ARENA_ALONE = "glibc.malloc.arena_max=1"
# Larger arrays have mappings of their own. Arrays of the library are larger; without it scratch memory is in the arena.
_LARGE, _LARGE_ALONE = 2**24, 2**28


def trim() -> None:
    """Returns freed memory that the allocator holds to the system: about 0.2 GB after a compilation."""
    if not _is_glibc():
        return
    process = ctypes.CDLL(None)
    process.malloc_trim(0)
    if return_kept_memory := getattr(process, "efficientllm_return_kept_memory", None):  # of a run with the library
        return_kept_memory()


def settings() -> dict[str, str]:
    """Environment variables by which freed memory is kept; in huge pages where the system grants them on request.

    XLA allocates its scratch memory anew in every step, and each new page costs a fault. A step with 0.21 GB of it has
    53,000 faults and takes 0.44 s of CPU time; 0.38 s in huge pages, and 0.32 s in huge pages that are kept (a virtual
    machine). Its process holds 0.47 GB between steps, and 0.68 GB with kept pages.

    glibc alone cannot keep it: where a small array comes to lie in the freed memory, or a step begins before the one
    before has freed its own, the next is taken anew beside it. With 0.66 GB of scratch memory the peak was 1.4, 2.0 or
    2.7 GB, as chance would have it, and with `ops/native/keeping.cc`, which is preloaded, 1.4 GB in each of three runs
    (AMD EPYC, Zen 5, 2026-11-30). Without that library memory above 256 MB is returned, and a step with 0.83 GB of it
    took 6 to 10 % longer (AMD EPYC, Zen 3, 2026-11-29).
    """
    if not _is_glibc() or TUNABLES in os.environ:
        return {}
    on_request = HUGE_PAGES.is_file() and "[madvise]" in HUGE_PAGES.read_text()
    library = _keeping_library()
    large = _LARGE_ALONE if library is None else _LARGE
    own = (*[_ARENA_ALONE] * (library is None), _KEPT, f"glibc.malloc.mmap_threshold={large}")
    tunables = {TUNABLES: ":".join((*own, *["glibc.malloc.hugetlb=1"] * on_request))}
    if library is None:
        return tunables
    return tunables | {PRELOADED: ":".join(filter(None, [os.environ.get(PRELOADED), str(library)]))}


def restart_with_settings() -> None:
    """Re-executes this program with the variables of `settings`, which are read only at start."""
    if variables := settings():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


def _keeping_library():
    """The path of the library; None where setup.py found no compiler, or the path is none that LD_PRELOAD can hold."""
    paths = [path for path in sorted(LIBRARIES.glob("_keeping*.so")) if not {" ", ":"} & set(str(path))]
    return paths[0] if paths else None


def _is_glibc():
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
