"""Count of compiled programs, from `jax.monitoring`: a compilation inside a measured window invalidates it."""

import functools

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # also sent where the program comes from the cache on disk
_seen: list[float] = []


def count_programs() -> int:
    """Counts the programs compiled since the first call of this function."""
    _listen()
    return len(_seen)


@functools.cache
def _listen():
    jax.monitoring.register_event_duration_secs_listener(_note)


def _note(name, seconds, **_):
    if name == EVENT:
        _seen.append(seconds)
