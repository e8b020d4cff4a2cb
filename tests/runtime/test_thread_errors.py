"""Errors of failed writes that asyncio logs of itself are kept off the console, and no others."""

import logging

import pytest

from efficientllm.runtime import thread_errors

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("message", "error", "is_printed"),
    [
        ("Future exception was never retrieved", ValueError("Error writing 'x' in OCDBT database"), False),
        ("Future exception was never retrieved", ValueError("something else"), True),
        ("Executing a task took 3 seconds", ValueError("Error writing 'x' in OCDBT database"), True),
        ("Future exception was never retrieved", None, True),
    ],
)
def test_only_failed_writes_are_kept_off(message, error, is_printed):
    information = (type(error), error, None) if error else None
    record = logging.LogRecord("asyncio", logging.ERROR, "events.py", 1, message, (), information)
    assert thread_errors.is_no_failed_write(record) == is_printed
