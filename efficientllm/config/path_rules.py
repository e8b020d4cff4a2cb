"""Rules for config values that are paths or names of folders; `value_rules` says what a rule is."""

import typing

from efficientllm.errors import UserError, short_repr
from efficientllm.untrusted import files

LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, on Linux


def check_path(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A path that an operating system accepts."""
    names = value.encode().split(b"/")
    if "\0" in value or len(value.encode()) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
        raise UserError(
            f"{where} = {short_repr(value)}: is not a path; a name in it has at most {LONGEST_NAME} bytes, "
            "and no byte 0"
        )


def check_file(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """The path of a regular file, or of nothing yet: reading a device never ends, and a FIFO waits for a writer."""
    check_path(where, value)
    if value and files.is_there(value) and not files.is_file(value):
        raise UserError(f"{where} = {short_repr(value)}: is a folder, a FIFO or a device; name a regular file")


def check_source_path(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A path that is not empty."""
    if not value:
        raise UserError(f"{where} = '': is empty; name a file, a folder or a glob")
    check_path(where, value)


def check_folder_name(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A name that a folder below runs/ can have."""
    bad = not value or value in (".", "..") or value != value.strip() or not value.isprintable()
    if bad or set(value) & set('/\\:*?"<>|') or len(value.encode()) > LONGEST_NAME:
        raise UserError(
            f"{where} = {short_repr(value)}: names a folder under runs/; at most {LONGEST_NAME} letters, digits, dots, "
            "dashes and the like, without a slash"
        )
