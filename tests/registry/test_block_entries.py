"""Entries of a pattern: counts, parallel mixers, ffns, and marks within specs."""

import pytest

from efficientllm.registry.block_entries import Entry, parse_entry, split_specs

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("gqa", Entry(None, ["gqa"], "")),
        ("gqa | moe(top_k=2)", Entry(None, ["gqa"], "moe(top_k=2)")),
        ("13*joint(last=True) + mha | gelu", Entry(13, ["joint(last=True)", "mha"], "gelu")),
        ("mha(norm='a(b=\"|\")') |", Entry(None, ["mha(norm='a(b=\"|\")')"], "")),
        ("0 * gqa", Entry(None, ["0 * gqa"], "")),
    ],
)
def test_an_entry_has_repeats_mixers_and_an_ffn(entry, expected):
    assert parse_entry(entry) == expected


def test_marks_in_brackets_and_texts_split_nothing():
    nested = repr("a(b='x + y')")
    spec = f"one(p={nested}, q=(1, [2 + 3]), r='it\\'s + that')"
    assert split_specs(f"{spec} + two") == [spec, "two"]
    assert split_specs("") == [""]
