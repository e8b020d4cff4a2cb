"""What is printed reaches every console: one that lacks a letter shows another in its place."""

import sys


def print_all_letters():
    """From now on `sys.stdout` replaces letters that its encoding lacks, where it would raise UnicodeEncodeError."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
