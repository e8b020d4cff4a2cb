"""Tracebacks that other libraries' threads print of errors which they also raise, kept off the console."""

import functools
import logging
import sys


@functools.cache
def silence_orbax():
    """From now on orbax's threads do not print the errors of writes: `save` and `wait` raise them.

    Its threads log each with a traceback, and tensorstore hands one for each array still in flight to
    `sys.unraisablehook`, also after the manager is closed (391 lines for one full disk).
    """
    hook = sys.unraisablehook

    def unraisablehook(unraisable):
        if not is_of_orbax(unraisable.exc_value):
            hook(unraisable)

    logging.getLogger("absl").addFilter(_keep)
    sys.unraisablehook = unraisablehook


def is_of_orbax(error):
    """Whether an error that nobody can catch is what a failed write leaves of orbax's event loop."""
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)


def _keep(record):
    return not (record.exc_info and "orbax" in record.pathname)
