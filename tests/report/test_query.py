"""Queries of limits, read by programs as by the page."""

import ast
import pathlib
import re

import pytest

from efficientllm.errors import UserError
from efficientllm.report import columns, query

pytestmark = pytest.mark.quick
COLUMNS = {column.key: column for column in columns.list_columns([])}
PAGE = pathlib.Path(query.__file__).parent / "page" / "query.js"


def parse(text):
    return query.parse_query(text, COLUMNS)


@pytest.mark.parametrize(
    "text",
    [
        "least j_per_token with peak_memory_bytes <= 24 GB and eval_loss <= +1 %",
        "memory <= 24 GB and eval_loss <= +1 % and least j_per_token",
        "Peak Memory ≤ 24GB, eval loss<=+1%; lowest J/token",
    ],
)
def test_a_goal_stands_before_or_after_its_conditions(text):
    asked = parse(text)
    assert (asked.goal, asked.most) == ("j_per_token", False)
    memory, loss = asked.conditions
    assert (memory.key, memory.sign, memory.absolute, memory.relative) == ("peak_memory_bytes", "<=", 24e9, None)
    assert (loss.key, loss.absolute, loss.relative) == ("eval_loss", None, pytest.approx(1.01))
    assert asked.keys == ("peak_memory_bytes", "eval_loss", "j_per_token")


@pytest.mark.parametrize(
    ("text", "key", "sign", "bound"),
    [
        ("tpot <= 20 ms", "tpot_s", "<=", 0.02),
        ("AMU < 3.5 GiB", "amu_gb", "<", 3.5 * 2**30 / 1e9),
        ("pcu >= 90 %", "pcu", ">=", 0.9),
        ("eval_loss == 2.5 nat", "eval_loss", "=", 2.5),
        ("usd_per_run <= 12 $", "usd_per_run", "<=", 12),
        ("co2_g_per_run <= 2 kg", "co2_g_per_run", "<=", 2000),
        ("tokens_per_s > 1e3", "tokens_per_s", ">", 1000),
        ("eval_loss <= -5 %", "eval_loss", "<=", 0.95),
    ],
)
def test_values_are_in_the_unit_of_their_metric(text, key, sign, bound):
    (condition,) = parse(text).conditions
    assert (condition.key, condition.sign) == (key, sign) and condition.bound == pytest.approx(bound)
    assert parse(text).goal is None


def test_conditions_hold_as_they_say():
    below, above, equal = parse("al_s <= 2 and al_s > 1 s and al_s = 1.5").conditions
    assert below.holds(2) and not below.holds(2.001)
    assert above.holds(1.5) and not above.holds(1)
    assert equal.holds(1.5) and not equal.holds(1.51)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lest al_s", "'lest al_s' is no condition"),
        ("least al_x", "did you mean 'al_s'?"),
        ("least al_s and most pcu", "one metric can be best"),
        ("eval_loss <= much", "'much' is no value for eval_loss"),
        ("al_s <= 3 GB", "'GB' is no unit for al_s, which is in s"),
        ("amu_gb <= 3 parsec", "'parsec' is no unit for amu_gb, which is in GB"),
    ],
)
def test_a_wrong_query_is_told_what_would_be_right(text, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(text)


def test_the_page_knows_the_same_units():
    (table,) = re.findall(r"const UNITS = \{(.*?)\n\};", PAGE.read_text(), re.DOTALL)
    pairs = re.findall(r'(?:"([^"]*)"|([\w$]+)): \[("\w+"|"1/s"|null), ([\d.e-]+)\]', table)
    of_page = {
        quoted or word: (None if unit == "null" else unit.strip('"'), ast.literal_eval(factor))
        for quoted, word, unit, factor in pairs
    }
    assert of_page == query.UNITS
