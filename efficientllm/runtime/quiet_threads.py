"""Suppresses tracebacks that threads of orbax print about errors which orbax also raises."""

import functools
import logging
import sys


@functools.cache
def silence_orbax() -> None:
    """Stops threads of orbax from printing write errors, which `save` and `wait` raise anyway.

    Each thread logs a traceback, and tensorstore passes one for each array in flight to `sys.unraisablehook`, even
    after the manager is closed (391 lines for one full disk).
    """
    hook = sys.unraisablehook

    def unraisablehook(unraisable):
        if not is_of_orbax(unraisable.exc_value):
            hook(unraisable)

    logging.getLogger("absl").addFilter(_is_not_from_orbax)
    sys.unraisablehook = unraisablehook


def is_of_orbax(error: BaseException | None) -> bool:
    """Whether an unraisable error comes from orbax's event loop after a failed write."""
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)


def _is_not_from_orbax(record):
    return not (record.exc_info and "orbax" in record.pathname)
