"""Warnings for optional work that fails; out-of-memory messages."""

import contextlib
import logging
from collections.abc import Iterator

from efficientllm.errors import UserError
from efficientllm.registry.plugins import one_line_with_location

log = logging.getLogger("efficientllm")


def out_of_memory(error: Exception) -> str | None:
    """Returns `out of device memory: ...` for an error of the runtime that says so, else None."""
    text = str(error)
    return f"out of device memory: {text.splitlines()[0]}" if "RESOURCE_EXHAUSTED" in text else None


@contextlib.contextmanager
def optional(what: str, notes: list[str] | None = None) -> Iterator[None]:
    """Turns an exception inside into a warning that starts with `what`, added to `notes` too: the run goes on."""
    try:
        yield
    except Exception as error:
        warn(what, error)
        if notes is not None:
            notes.append(f"{what}: {_message(error)}")


def warn(what: str, error: Exception) -> None:
    """Logs one warning line for optional work that failed."""
    log.warning(f"{what}: {_message(error)}")


def _message(error):
    """The message of a UserError; the type, message and location of others."""
    return str(error) if isinstance(error, UserError) else one_line_with_location(error)
