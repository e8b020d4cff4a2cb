"""The allocator keeps XLA's scratch memory from step to step, so that its pages are not made anew."""

import os
import resource
import subprocess
import sys

import pytest

from efficientllm.runtime import malloc

pytestmark = [pytest.mark.quick, pytest.mark.skipif(not malloc._is_glibc(), reason="no glibc")]

# Page faults of a program that makes an array of 64 MiB and drops it, for each of five turns; then the memory held.
PROGRAM = """
import ctypes, resource, threading
from efficientllm.runtime import malloc
size = 64 << 20
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for each page, whatever the system grants
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def turns():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        array = libc.malloc(size)
        ctypes.memset(array, 1, size)
        libc.free(array)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=turns)  # as XLA, whose threads have arenas of their own otherwise
thread.start()
thread.join()
held = resident()
malloc.trim()
print(held - resident())
"""


def faults(environment):
    inherited = {key: value for key, value in os.environ.items() if key != malloc.TUNABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=inherited | environment, capture_output=True, text=True, check=True
    )
    *turns, returned = map(int, done.stdout.split())
    return turns, returned


def test_freed_memory_is_kept_until_it_is_trimmed(monkeypatch):
    monkeypatch.delenv(malloc.TUNABLES, raising=False)
    monkeypatch.setattr(malloc, "HUGE_PAGES", malloc.pathlib.Path("nowhere"))
    pages = (64 << 20) // resource.getpagesize()
    turns, returned = faults(malloc.settings())
    assert turns[0] > 0.6 * pages and max(turns[1:]) < 100 and returned > 60 << 20
    plain, _ = faults({})
    assert min(plain) > 0.6 * pages


@pytest.mark.parametrize("granted, asks", [("always [madvise] never", True), ("[always] madvise never", False)])
def test_huge_pages_are_asked_for_where_that_helps(granted, asks, tmp_path, monkeypatch):
    monkeypatch.delenv(malloc.TUNABLES, raising=False)
    monkeypatch.setattr(malloc, "HUGE_PAGES", tmp_path / "enabled")
    malloc.HUGE_PAGES.write_text(granted)
    assert ("hugetlb=1" in malloc.settings()[malloc.TUNABLES]) == asks


def test_what_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setenv(malloc.TUNABLES, "glibc.malloc.check=1")
    assert malloc.settings() == {}
