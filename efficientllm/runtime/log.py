"""Logging to the console and `log.txt`, and progress lines of long work."""

import logging
import sys
import time
import typing

from efficientllm.runtime import console
from efficientllm.typing import PathLike


class _LogFile(logging.FileHandler):
    """Log file that ends silently on a full disk, where logging would print a traceback for each line."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def open_log(file: PathLike | None) -> logging.Logger:
    """Opens the package's logger, which writes to the console and to `file`; without a file, only errors to stderr."""
    log = logging.getLogger("efficientllm")
    log.setLevel(logging.INFO)
    log.propagate = False
    close_log()
    console.print_all_letters()
    handlers = (
        (logging.StreamHandler(sys.stdout), _LogFile(file, encoding="utf-8")) if file else (logging.StreamHandler(),)
    )
    for handler in handlers:
        handler.setLevel(logging.INFO if file else logging.ERROR)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    return log


def close_log() -> None:
    """Closes what `open_log` opened."""
    log = logging.getLogger("efficientllm")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class Countdown:
    """Logs the progress of long work and an estimate of the time left, at most every `every_s` seconds."""

    def __init__(
        self, what: str, total: float, every_s: float = 10.0, clock: typing.Callable[[], float] = time.monotonic
    ):
        self._what, self._total, self._every_s, self._clock = what, total, every_s, clock
        self._begun = self._logged = clock()
        self._done = 0.0

    def add(self, amount: float = 1) -> None:
        """Adds `amount` to what is done."""
        self._done += amount
        now = self._clock()
        if now - self._logged >= self._every_s and 0 < self._done < self._total:
            left = (now - self._begun) / self._done * (self._total - self._done)
            logging.getLogger("efficientllm").info(
                f"{self._what}: {self._done / self._total:.0%}, {clock_time(left)} left"
            )
            self._logged = now


def clock_time(seconds: float) -> str:
    """Formats a duration as `1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
