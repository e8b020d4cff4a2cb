"""Regular expressions that backtrack, repeat without end or are none: one line within seconds."""

import re
import time

import pytest

from efficientllm.errors import UserError
from efficientllm.untrusted import patterns

pytestmark = pytest.mark.quick

PATH = "groups/block_0/mixer/q/kernel"
ENDLESS = [("(a|aa)+$", "a" * 60 + "b"), ("(?:(?:a|b|ab)*)*c", "ab" * 40), (r"(\w+\s?)*\1!", "a b " * 30)]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)


@pytest.mark.parametrize("expression, text", ENDLESS)
@pytest.mark.parametrize("method", ["search", "match", "fullmatch"])
def test_one_that_backtracks_ends(expression, text, method):
    pattern = patterns.Pattern(expression, "config.adapter: target")
    started = time.thread_time()
    try:
        getattr(pattern, method)(text)
    except UserError as error:
        assert str(error).startswith("config.adapter: target: ") and "takes more than" in str(error)
        with pytest.raises(UserError, match="takes more than"):  # the time is spent, whatever comes next
            pattern.search("short")
    assert time.thread_time() - started < 1.0


def test_some_do_backtrack():
    with pytest.raises(UserError, match="takes more than"):
        patterns.Pattern("(a|aa)+$", "here").search("a" * 60 + "b")


@pytest.mark.parametrize(
    "expression, message",
    [
        ("(", "is no regex: missing"),
        ("*", "is no regex: nothing to repeat"),
        ("a{2,1}", "is no regex: min repeat greater"),
        (r"\p{L}", "is no regex: bad escape"),  # regex's own syntax
        (3, "is no regex; write a text"),
        (["a"], "is no regex; write a text"),
        ("(((a{1000}){1000}){1000}){1000}", "repeats more than"),
        ("a{99999999999999999999}", "repeats more than"),
        ("(" * 3000 + "a" + ")" * 3000, "is no regex"),
        ("a" * 20_000, "has 20000 characters"),
    ],
    ids=str,
)
def test_what_is_none_is_one_line(expression, message):
    with pytest.raises(UserError) as error:
        patterns.compile(expression, "config.adapter: target")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_matching_is_that_of_re():
    for expression in (
        r"mixer/(q|v)/kernel$",
        r"block_\d+/",
        r"^groups",
        "",
        "Q",
        r"(?i)MIXER",
        r"[[a]",
        r"q/(?!kernel)",
    ):
        ours = patterns.compile(expression, "here")
        for method in ("search", "match", "fullmatch"):
            expected = getattr(re.compile(expression), method)(PATH)
            actual = getattr(ours, method)(PATH)
            assert (actual and actual.span()) == (expected and expected.span()), expression


def test_quick_ones_never_run_out():
    pattern = patterns.compile("mixer", "here")
    for _ in range(20_000):
        assert pattern.search(PATH)
