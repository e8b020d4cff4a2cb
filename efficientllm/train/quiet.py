"""Tracebacks that other libraries' threads print of errors which they also raise, kept off the console."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def tracebacks_of_orbax():
    """Inside, orbax's threads do not print the errors of writes: `save` and `wait` raise them.

    Its threads log each with a traceback, and tensorstore hands one for each array still in flight to `sys.excepthook`
    (391 lines for one full disk).
    """
    logger, hook = logging.getLogger("absl"), sys.excepthook

    def excepthook(kind, error, traceback):
        if not (kind is RuntimeError and "Event loop is closed" in str(error)):
            hook(kind, error, traceback)

    logger.addFilter(_keep)
    sys.excepthook = excepthook
    try:
        yield
    finally:
        logger.removeFilter(_keep)
        if sys.excepthook is excepthook:
            sys.excepthook = hook


def _keep(record):
    return not (record.exc_info and "orbax" in record.pathname)
