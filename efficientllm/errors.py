"""The one error a user is meant to read: one line that names the key, the value and what would be right."""

import difflib
import pathlib
import sys

WIDEST = 240  # characters of a value in a message


class UserError(ValueError):
    """Bad config or input. `main` prints the message and exits with status 2.

    The message is one line that a terminal shows as it is, whatever names and values of others stand in it.
    """

    def __init__(self, message):
        super().__init__(_printable(" ".join(str(message).splitlines())))


_LONGEST = 4000


def _printable(text):
    """The text with control characters and halves of surrogate pairs escaped, and its middle left out if it is long."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(char if char.isprintable() or char == " " else ascii(char)[1:-1] for char in text)


def exit_with(command):
    """Ends the process with the status that `command()` returns; a UserError is one line and status 2."""
    try:
        sys.exit(command())
    except UserError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def did_you_mean(word, known):
    """Returns `"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    word, known = str(word)[:WIDEST], list(known)
    close = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value):
    """`repr(value)` on one line, cut where it is longer than a message should be."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints
        text = f"a {type(value).__name__} too large to print"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 20]}... ({len(text):,} characters)"


def one_line(error):
    """The type and the message of an exception on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 2 * WIDEST else f"{text[: 2 * WIDEST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
