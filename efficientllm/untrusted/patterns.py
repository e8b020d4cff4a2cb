"""Regular expressions that others wrote, or a user in a config: with a limit on the time that they take.

Python's `re` backtracks without end and cannot be interrupted. `regex`, which transformers needs too, has the same
syntax and a timeout; what `re` does not compile is refused, so that no expression means something of regex's own.
"""

import functools
import math
import re
import time
import warnings

from efficientllm.errors import UserError

SECONDS = 2.0  # for all that one expression is matched with, quick ones apart
_QUICK = 1e-3
LONGEST = 10_000  # characters of an expression
_REPEATS = 10_000  # counted ones, multiplied: regex unrolls them, and takes their product of memory
_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


class Pattern:
    """A compiled expression. `search`, `match` and `fullmatch` raise UserError once all together took SECONDS.

    Raises UserError for what is no regular expression; messages are `where: ...`.
    """

    def __init__(self, expression, where):
        self._where = f"{where}: {_shown(expression)}"
        if not isinstance(expression, str):
            raise UserError(f"{self._where} is no regex, which is a text")
        self.pattern = expression
        self._compiled = self._compile(expression)
        self._left = SECONDS

    def search(self, text):
        """As of `re.Pattern`."""
        return self._timed(self._compiled.search, text)

    def match(self, text):
        """As of `re.Pattern`."""
        return self._timed(self._compiled.match, text)

    def fullmatch(self, text):
        """As of `re.Pattern`."""
        return self._timed(self._compiled.fullmatch, text)

    def __repr__(self):
        return f"Pattern({self.pattern!r})"

    def _compile(self, expression):
        import regex

        if len(expression) > LONGEST:
            raise UserError(f"{self._where} has {len(expression)} characters; at most {LONGEST} are taken")
        counts = [int((most or least)[:9]) for least, most in _COUNT.findall(expression)]
        if math.prod(max(1, count) for count in counts) > _REPEATS:
            raise UserError(f"{self._where} repeats more than {_REPEATS} times what it counts; write * or +")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets that other languages would nest
                re.compile(expression)
                return regex.compile(expression, regex.VERSION0)
        except (re.error, regex.error, OverflowError, ValueError, RecursionError) as error:
            raise UserError(f"{self._where} is no regex: {error}") from None

    def _timed(self, method, text):
        if self._left <= 0:
            raise self._endless()
        start = time.thread_time()
        try:
            return method(text, timeout=self._left)
        except TimeoutError:
            self._left = 0
            raise self._endless() from None
        except (MemoryError, RecursionError) as error:
            raise UserError(f"{self._where} cannot be matched: {type(error).__name__}") from None
        finally:
            took = time.thread_time() - start
            self._left -= took if took > _QUICK else 0

    def _endless(self):
        return UserError(
            f"{self._where} takes more than {SECONDS:g} s to match: it backtracks; write it without nested repeats"
        )


def compile(expression, where):
    """The Pattern of a regular expression. Raises UserError, `where: ...`, for what is none."""
    return _compiled(expression, where) if isinstance(expression, str) else Pattern(expression, where)


@functools.lru_cache(maxsize=256)  # one that took too long once is refused at once
def _compiled(expression, where):
    return Pattern(expression, where)


def _shown(expression):
    text = repr(expression)
    return text if len(text) <= 80 else f"{text[:77]}..."
