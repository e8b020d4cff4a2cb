"""Suppresses tracebacks that threads of orbax print about errors which orbax also raises."""

import functools
import logging
import sys
import traceback


@functools.cache
def silence_orbax() -> None:
    """Stops threads of orbax from printing write errors, which `save` and `wait` raise anyway.

    Each thread logs a traceback, and tensorstore passes one for each array in flight to `sys.unraisablehook`, even
    after the manager is closed (391 lines for one full disk). asyncio logs one for each write whose error nobody asked
    for, when it is collected, which may be never.
    """
    hook = sys.unraisablehook

    def unraisablehook(unraisable):
        if not is_of_orbax(unraisable.exc_value):
            hook(unraisable)

    logging.getLogger("absl").addFilter(_is_not_from_orbax)
    logging.getLogger("asyncio").addFilter(is_no_failed_write)
    sys.unraisablehook = unraisablehook


def is_of_orbax(error: BaseException | None) -> bool:
    """Whether an unraisable error comes from orbax's event loop after a failed write."""
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)


def is_no_failed_write(record: logging.LogRecord) -> bool:
    """False for asyncio's record of an error of orbax or of its database that no task retrieved."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or "exception was never retrieved" not in record.getMessage():
        return True
    return "OCDBT" not in str(error) and "orbax" not in "".join(traceback.format_tb(error.__traceback__))


def _is_not_from_orbax(record):
    return not (record.exc_info and "orbax" in record.pathname)
