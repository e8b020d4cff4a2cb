"""What is optional and may fail, and what an error of the runtime means."""

import contextlib
import logging

from efficientllm.errors import UserError
from efficientllm.registry.plugins import one_line_with_location

log = logging.getLogger("efficientllm")


def out_of_memory(error):
    """`out of device memory: ...` where that is what an error of the runtime says, else None."""
    text = str(error)
    return f"out of device memory: {text.splitlines()[0]}" if "RESOURCE_EXHAUSTED" in text else None


@contextlib.contextmanager
def optional(what, notes=None):
    """What is done inside may fail: the run has its row, and a warning (and `notes`, a list) says what it lacks."""
    try:
        yield
    except Exception as error:
        warn(what, error)
        if notes is not None:
            notes.append(f"{what}: {_message(error)}")


def warn(what, error):
    """One warning line for something optional that failed."""
    log.warning(f"{what}: {_message(error)}")


def _message(error):
    """A UserError says what it is; others are named with their place."""
    return str(error) if isinstance(error, UserError) else one_line_with_location(error)
