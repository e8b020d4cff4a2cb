"""Compile cache: compiled programs that later processes load from the user's cache folder.

It is JAX's persistent compilation cache, which names a program by its text, the compiler's options, the devices and the
version of jaxlib. Each kind of processor has a folder, as a program for a CPU has its instructions.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import platform
import typing

import jax
from jax.experimental.compilation_cache import compilation_cache

from efficientllm.runtime import cpuinfo, user_cache

MAX_BYTES = 2 * 1024**3  # of a folder; those programs go first that were loaded the longest time ago
MIN_COMPILE_S = 0.2
LOADED = "loaded from the compile cache; config.compile_cache = False compiles anew"
_OPTIONS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_S,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
_loads = [0]
log = logging.getLogger("efficientllm")


@contextlib.contextmanager
def of_run(is_on: bool, by_names: bool = False) -> typing.Iterator[None]:
    """Context in which programs are loaded from the cache and written to it, or are compiled anew.

    With `by_names` a program is loaded only if its operations have the names that they would have. Else they may be
    those of another version of this program, or of a model that computes the same.

    A cache that the user has given JAX ($JAX_COMPILATION_CACHE_DIR) is used as it is in place of this one.
    """
    _listen()
    _loads[0] = 0
    options: dict[str, typing.Any] = {"jax_compilation_cache_include_metadata_in_key": True} if by_names else {}
    if not is_on:
        options["jax_enable_compilation_cache"] = False
    elif not _is_given() and _made():
        options |= {"jax_compilation_cache_dir": str(folder()), "jax_enable_compilation_cache": True, **_OPTIONS}
    if not options:
        yield
        return
    before = {name: getattr(jax.config, name) for name in options}
    _configure(options)
    try:
        yield
    finally:
        _configure(before)


def folder() -> pathlib.Path:
    """Returns the folder of programs for this kind of processor."""
    return user_cache.folder() / "programs" / _processor()


def loads() -> int:
    """Counts the programs that were loaded rather than compiled since the last `of_run` began."""
    return _loads[0]


def _is_given():
    """Whether the user has given JAX a cache, or wants none."""
    return bool(jax.config.jax_compilation_cache_dir) or os.environ.get(user_cache.PROGRAMS) == "off"


def _made():
    """Whether the folder is there, made for the user alone: its programs are run."""
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no compile cache: %s cannot be made (%s)", folder(), error.strerror)
        return False
    return True


def _configure(options):
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX reads its options once


@functools.cache
def _processor():
    """A hash of the processor's name and instructions."""
    facts = cpuinfo.first_processor()
    names = [facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "model name", "flags", "Features")]
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *names]).encode()).hexdigest()[:12]


@functools.cache
def _listen():
    def count(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            _loads[0] += 1

    jax.monitoring.register_event_listener(count)
