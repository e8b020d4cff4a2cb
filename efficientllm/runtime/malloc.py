"""Two requests to glibc's allocator, for programs whose scratch memory is taken anew in every step, as XLA's on CPUs.

Elsewhere than on Linux with glibc nothing is asked.
"""

import ctypes
import os
import pathlib
import platform
import sys

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def give_back():
    """Returns to the system what the allocator keeps of freed memory: of a compiler's, some 0.2 GB."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def huge_pages():
    """The environment in which glibc asks for huge pages; empty where the system gives them unasked, or never.

    A page costs a fault: 4 KiB at a time, 1 GB of fresh memory costs 0.6 s of CPU time, and by huge pages 0.2 s (seen
    on a virtual machine).
    """
    unasked = not HUGE_PAGES.is_file() or "[madvise]" not in HUGE_PAGES.read_text()
    return {} if unasked or not _is_glibc() or TUNABLES in os.environ else {TUNABLES: "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages():
    """Replaces this program by itself in the environment `huge_pages`: glibc looks at it at its start alone."""
    if added := huge_pages():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)


def _is_glibc():
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
