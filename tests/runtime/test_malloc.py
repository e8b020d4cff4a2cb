"""The allocator keeps XLA's scratch memory from step to step, so that its pages are not made anew."""

import os
import resource
import subprocess
import sys

import pytest

from efficientllm.runtime import malloc

pytestmark = [pytest.mark.quick, pytest.mark.skipif(not malloc._is_glibc(), reason="no glibc")]

PREAMBLE = """
import ctypes, resource, threading, time
from efficientllm.runtime import malloc
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for each page, whatever the system grants
libc.memalign.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 64 << 20
def take(size):
    array = libc.memalign(64, size)
    ctypes.memset(array, 1, size)
    return array
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
"""
# Page faults of a program that makes an array of 64 MiB and drops it, for each of five turns; then the memory held.
TURNS = """
def turns():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        libc.free(take(size))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=turns)  # as XLA, whose threads have arenas of their own otherwise
thread.start()
thread.join()
held = resident()
malloc.trim()
print(held - resident())
"""
# The memory that steps add after the first, where a small array is made while no step has its scratch memory; and where
# a step begins a little before the one before has freed its own.
SPLIT = """
scratch = take(size)
above, before = take(1 << 20), resident()
libc.free(scratch)
small = [take(1 << 20) for _ in range(3)]
libc.free(take(size))
print(resident() - before)
"""
OVERLAPPING = """
def step(free_after):
    scratch = take(size)
    time.sleep(free_after)
    libc.free(scratch)
step(0)
before = resident()
threads = [threading.Thread(target=step, args=(0.03,)) for _ in range(3)]
for thread in threads:
    thread.start()
    time.sleep(0.02)
for thread in threads:
    thread.join()
print(resident() - before)
"""


def run(program, environment):
    inherited = {key: value for key, value in os.environ.items() if key != malloc.TUNABLES}
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return list(map(int, done.stdout.split()))


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.delenv(malloc.TUNABLES, raising=False)
    monkeypatch.setattr(malloc, "HUGE_PAGES", malloc.pathlib.Path("nowhere"))
    return malloc.settings()


@pytest.fixture
def preloaded(settings):
    if malloc.PRELOADED not in settings:
        pytest.skip("setup.py found no compiler")
    return settings


def test_freed_memory_is_kept_until_it_is_trimmed(settings):
    pages = (64 << 20) // resource.getpagesize()
    *turns, returned = run(TURNS, settings)
    assert turns[0] > 0.6 * pages and max(turns[1:]) < 100 and returned > 60 << 20
    *plain, _ = run(TURNS, {})
    assert min(plain) > 0.6 * pages


@pytest.mark.parametrize("program, most", [(SPLIT, 8 << 20), (OVERLAPPING, 8 << 20)])
def test_scratch_memory_is_not_taken_twice(program, most, preloaded):
    assert run(program, preloaded)[0] < most
    in_one_arena = preloaded[malloc.TUNABLES] + ":glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0"
    assert run(program, {malloc.TUNABLES: in_one_arena})[0] > 60 << 20


def test_an_array_of_the_library_grows_and_ends(preloaded):
    program = """
libc.realloc.restype, libc.realloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
array = libc.realloc(take(size), 2 * size)
print(*ctypes.string_at(array + size - 2, 2))
libc.free(array)
"""
    assert run(program, preloaded) == [1, 1]


def test_without_the_library_scratch_memory_is_bounded(monkeypatch, tmp_path):
    monkeypatch.delenv(malloc.TUNABLES, raising=False)
    folder = tmp_path / "of a name that LD_PRELOAD divides"
    for libraries in ((), ("_keeping.so",)):
        folder.mkdir(exist_ok=True)
        for name in libraries:
            (folder / name).touch()
        monkeypatch.setattr(malloc, "LIBRARIES", folder)
        assert malloc.PRELOADED not in malloc.settings()
        assert f"mmap_threshold={2**28}" in malloc.settings()[malloc.TUNABLES]


@pytest.mark.parametrize("granted, asks", [("always [madvise] never", True), ("[always] madvise never", False)])
def test_huge_pages_are_asked_for_where_that_helps(granted, asks, tmp_path, monkeypatch):
    monkeypatch.delenv(malloc.TUNABLES, raising=False)
    monkeypatch.setattr(malloc, "HUGE_PAGES", tmp_path / "enabled")
    malloc.HUGE_PAGES.write_text(granted)
    assert ("hugetlb=1" in malloc.settings()[malloc.TUNABLES]) == asks


def test_what_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setenv(malloc.TUNABLES, "glibc.malloc.check=1")
    assert malloc.settings() == {}
