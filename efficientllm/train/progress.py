"""One line a report: step, loss, rate, time left, on the console and in `log.txt`."""

import collections
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


class Progress:
    """Rate and time left over the last steps."""

    def __init__(self, steps, clock=time.monotonic, window=20):
        self._steps, self._clock = steps, clock
        self._recent = collections.deque(maxlen=window)

    def add(self, tokens):
        """A step of `tokens` tokens has finished."""
        self._recent.append((self._clock(), tokens))

    def tokens_per_s(self):
        """Over the last steps, pauses for evaluation and checkpoints included; None before the second step."""
        if len(self._recent) < 2:
            return None
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in list(self._recent)[1:]) / seconds

    def line(self, step, loss):
        """`step  120/300  loss 4.321  5,120 tokens/s  0:42 left`."""
        rate = self.tokens_per_s()
        if rate is None:
            return f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}"
        mean = (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}  {rate:,.0f} tokens/s  "
            f"{clock_time((self._steps - step) * mean)} left"
        )


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
