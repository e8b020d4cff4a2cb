"""The one error a user is meant to read: one line that names the key, the value and what would be right."""

import difflib


class UserError(ValueError):
    """Bad config or input. `main` prints the message on one line and exits with status 2."""


def did_you_mean(word, known):
    """Returns `"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
