"""The one error a user is meant to read: one line that names the key, the value and what would be right."""

import difflib


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


def did_you_mean(word, known):
    """Returns `"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
