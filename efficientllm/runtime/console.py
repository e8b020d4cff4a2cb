"""The command line: its parser, whose errors are one line, and what every console can print."""

import argparse
import sys

from efficientllm.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser of `python -m MODULE`, which prints its own --help. An error is a UserError; no flag is abbreviated."""

    def __init__(self, module):
        super().__init__(f"python -m {module}", add_help=False, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def print_all_letters():
    """From now on `sys.stdout` replaces letters that its encoding lacks, where it would raise UnicodeEncodeError."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
