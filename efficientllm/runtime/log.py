"""The package's log: lines on the console and in `log.txt`, and how far a long piece of work is."""

import logging
import sys
import time

from efficientllm.runtime import console


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short, where logging would print a traceback for each line."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def open_log(file):
    """The package's logger, writing to the console and to `file`; without one, errors alone and to stderr."""
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


def close_log():
    """Closes what `open_log` opened."""
    log = logging.getLogger("efficientllm")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class Countdown:
    """Says how far a long piece of work is, and how long the rest takes, at most every `every_s` seconds."""

    def __init__(self, what, total, every_s=10.0, clock=time.monotonic):
        self._what, self._total, self._every_s, self._clock = what, total, every_s, clock
        self._begun = self._said = clock()
        self._done = 0

    def add(self, amount=1):
        """`amount` more of the total is done."""
        self._done += amount
        now = self._clock()
        if now - self._said >= self._every_s and 0 < self._done < self._total:
            left = (now - self._begun) / self._done * (self._total - self._done)
            logging.getLogger("efficientllm").info(
                f"{self._what}: {self._done / self._total:.0%}, {clock_time(left)} left"
            )
            self._said = now


def clock_time(seconds):
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
