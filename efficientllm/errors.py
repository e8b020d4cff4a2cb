"""UserError, the one error a user is meant to read: a line `KEY = VALUE: what is wrong; what to do`."""

import contextlib
import difflib
import pathlib
import sys
import typing

WIDEST = 240  # characters of a value in a message
_LONGEST = 4000  # characters of a message


class UserError(ValueError):
    """Bad config or input. `main` prints the message and exits with status 2.

    The message is one printable line, whatever file names and values it quotes.
    """

    shared = False  # whether all processes raise it

    def __init__(self, message: object):
        super().__init__(_escape(" ".join(str(message).splitlines())))


class FieldError(UserError):
    """UserError about a field of a config, from code that knows no config: `FIELD: problem; remedy`.

    `config.field_keys.name_keys` makes `KEY = VALUE: problem; remedy` of it. Give `value` where it may be another than
    the config's.
    """

    def __init__(self, field: str, problem: str, value: object = None):
        super().__init__(f"{field}: {problem}" if value is None else f"{field} = {short_repr(value)}: {problem}")
        self.field, self.problem, self.value = field, problem, value


def _escape(text):
    """Escapes control characters and lone surrogates, and cuts the middle out of a long text."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(char if char.isprintable() or char == " " else ascii(char)[1:-1] for char in text)


def exit_with(command: typing.Callable[[], typing.Any]) -> typing.NoReturn:
    """Ends the process with the status that `command()` returns, or 2 after printing its UserError."""
    try:
        sys.exit(command())
    except UserError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def error_prefix(where: str) -> typing.Iterator[None]:
    """Context in which the message of a UserError begins with `where`: a key and its value, or a record's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def did_you_mean(word: object, choices: typing.Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    word, choices = str(word)[:WIDEST], list(choices)
    close = difflib.get_close_matches(word, choices, n=1) or difflib.get_close_matches(word.lower(), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def short_repr(value: object) -> str:
    """`repr(value)` for a message: on one line, and cut to WIDEST characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print an int of thousands of digits
        text = f"a {type(value).__name__} too large to print"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 20]}... ({len(text):,} characters)"


def one_line(error: BaseException) -> str:
    """The type and the message of an exception, on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 2 * WIDEST else f"{text[: 2 * WIDEST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
