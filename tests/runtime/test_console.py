"""Consoles that lack letters: nothing that is printed raises."""

import io
import sys

import pytest

from efficientllm.report import __main__ as report
from efficientllm.runtime import console
from report import made


def ascii_console():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


def test_a_letter_that_a_console_lacks_is_another_one(monkeypatch):
    monkeypatch.setattr(sys, "stdout", ascii_console())
    with pytest.raises(UnicodeEncodeError):
        print("×")
    console.print_all_letters()
    print("×1.2 – 中")
    assert sys.stdout.buffer.getvalue() == b"?1.2 ? ?\n"


def test_a_comparison_is_printed_to_ascii(tmp_path, monkeypatch):
    for side, flops in (("a", 1e6), ("b", 2e6)):
        made.row(tmp_path / side, flops_per_token=flops, told={"run": side})
    monkeypatch.setattr(sys, "stdout", ascii_console())
    argv = ["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--metric=flops_per_token"]
    assert report.main(argv) == 1
    assert b"worse" in sys.stdout.buffer.getvalue()
