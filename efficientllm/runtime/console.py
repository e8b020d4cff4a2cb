"""Console helpers: an argument parser with one-line errors, and output in any encoding."""

import argparse
import sys
import typing

from efficientllm.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parser of `python -m MODULE`, which prints its own --help. Errors are UserErrors; flags cannot be abbreviated."""

    def __init__(self, module: str):
        super().__init__(f"python -m {module}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def print_all_letters() -> None:
    """Makes `sys.stdout` replace characters that its encoding lacks instead of raising UnicodeEncodeError."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
