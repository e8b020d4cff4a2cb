"""Safe regular expressions of users and files: with a limit on the matching time.

Python's `re` can backtrack without end and cannot be interrupted. `regex`, which transformers needs too, has a timeout.
An expression that `re` does not compile is refused, so that none uses syntax that only `regex` has.
"""

import functools
import math
import re
import time
import warnings

from efficientllm.errors import UserError

SECONDS = 2.0  # for all matches of one expression together, except those shorter than _QUICK
_QUICK = 1e-3
LONGEST = 10_000  # characters of an expression
_REPEATS = 10_000  # product of counted repeats: `regex` unrolls them in memory
_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


class Pattern:
    """Compiled expression whose methods raise UserError after SECONDS of matching in all.

    Raises UserError, `where: ...`, for an invalid expression.
    """

    def __init__(self, expression: str, where: str):
        self._where = f"{where}: {_shown(expression)}"
        if not isinstance(expression, str):
            raise UserError(f"{self._where} is no regex; write a text")
        self.pattern = expression
        self._compiled = self._compile(expression)
        self._left = SECONDS

    def search(self, text: str) -> re.Match | None:
        """As `re.Pattern.search`."""
        return self._timed(self._compiled.search, text)

    def match(self, text: str) -> re.Match | None:
        """As `re.Pattern.match`."""
        return self._timed(self._compiled.match, text)

    def fullmatch(self, text: str) -> re.Match | None:
        """As `re.Pattern.fullmatch`."""
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
                warnings.simplefilter("ignore")  # FutureWarning of nested sets
                re.compile(expression)
                return regex.compile(expression, regex.VERSION0)
        except (re.error, regex.error, OverflowError, ValueError, RecursionError) as error:
            raise UserError(f"{self._where} is no regex: {error}") from None

    def _timed(self, method, text):
        if self._left <= 0:
            raise self._timeout_error()
        start = time.thread_time()
        try:
            return method(text, timeout=self._left)
        except TimeoutError:
            self._left = 0.0
            raise self._timeout_error() from None
        except (MemoryError, RecursionError) as error:
            raise UserError(f"{self._where} cannot be matched: {type(error).__name__}") from None
        finally:
            elapsed = time.thread_time() - start
            self._left -= elapsed if elapsed > _QUICK else 0

    def _timeout_error(self):
        return UserError(
            f"{self._where} takes more than {SECONDS:g} s to match: it backtracks; write it without nested repeats"
        )


def compile(expression: str, where: str) -> Pattern:
    """Compiles a regular expression. Raises UserError, `where: ...`, for an invalid one."""
    return _compiled(expression, where) if isinstance(expression, str) else Pattern(expression, where)


@functools.lru_cache(maxsize=256)  # so that an expression that timed out once is refused at once
def _compiled(expression, where):
    return Pattern(expression, where)


def _shown(expression):
    text = repr(expression)
    return text if len(text) <= 80 else f"{text[:77]}..."
