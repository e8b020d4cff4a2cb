"""Additions to tune on: right, the same at every call, and held out by the numbers that are added."""

import json
import re

import pytest

from efficientllm.data.corpus import Corpus
from efficientllm.registry import build

pytestmark = pytest.mark.quick


def pairs(spec):
    """`(first number, second, what is answered, what decides the side)` of each record."""
    for text, group in build("data", spec).documents():
        system, question, answer = json.loads(text)
        assert [turn["role"] for turn in (system, question, answer)] == ["system", "user", "assistant"]
        first, second = question["content"].split(" + ")
        yield first, second, answer["content"], group


@pytest.mark.parametrize("digits", [1, 2, 3, 5])
def test_answers_are_right_and_numbers_have_their_digits(digits):
    records = list(pairs(f"sums(count=500, digits={digits})"))
    assert len(records) == 500 and len(set(records)) > 80
    for first, second, answer, _ in records:
        assert int(answer) == int(first) + int(second) and len(first) == len(second) == digits
        assert digits == 1 or first[0] != "0" != second[0]


def test_more_records_begin_with_the_same():
    assert list(pairs("sums(count=400)"))[:100] == list(pairs("sums(count=100)"))


def test_no_pair_is_on_both_sides_in_either_order():
    corpus = Corpus("sums(count=5000, digits=2, held_out=0.3)")
    sides = {
        side: {frozenset(re.findall(r"\d+", json.loads(text)[1]["content"])) for text in corpus.texts(side)}
        for side in ("train", "held_out")
    }
    assert min(map(len, sides.values())) > 500 and not sides["train"] & sides["held_out"]
