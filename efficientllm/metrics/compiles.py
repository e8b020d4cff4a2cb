"""Compilations: their number, as one inside a measured window invalidates it, and the Reading of their time."""

import functools

import jax

from efficientllm.metrics.reading import Reading, missing
from efficientllm.runtime import compile_cache

EVENT = "/jax/core/compile/backend_compile_duration"  # also sent where the program comes from the cache on disk
_seen: list[float] = []


def count_programs() -> int:
    """Counts the programs compiled since the first call of this function."""
    _listen()
    return len(_seen)


def time_reading(seconds: float, source: str, loads: int | None = None) -> Reading:
    """Returns the Reading `seconds`, or null if programs were loaded: `loads` of them, None for those of the run."""
    loads = compile_cache.loads() if loads is None else loads
    return missing("s", compile_cache.LOADED) if loads else Reading(seconds, "s", source)


@functools.cache
def _listen():
    jax.monitoring.register_event_duration_secs_listener(_note)


def _note(name, seconds, **_):
    if name == EVENT:
        _seen.append(seconds)
