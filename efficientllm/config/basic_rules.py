"""Rules from which those of config keys are built: names, one of some texts, regular expressions, tuples, pairs.

`value_rules` says what a rule is, and which key has which.
"""

import functools
import typing

from efficientllm import registry
from efficientllm.errors import UserError, did_you_mean, short_repr
from efficientllm.registry import catalogue, ranges
from efficientllm.untrusted import patterns

Rule = typing.Callable[[str, typing.Any, bool], None]


def name_of(kind: str, *extra: str) -> Rule:
    """The name of a technique that has no fields, or one of `extra`."""

    def rule(where, value, has_plugins):
        allowed = [*extra, *catalogue.entries(kind)]
        if not (has_plugins and value not in allowed):
            registry.check_name(kind, value, allowed, where)

    return rule


def one_of(allowed_texts: typing.Callable[[], typing.Collection[str]]) -> Rule:
    """One of the texts that `allowed_texts()` returns, which are read when a value is checked."""

    def rule(where, value, has_plugins):
        allowed = allowed_texts()
        if value not in allowed:
            raise UserError(
                f"{where} = {short_repr(value)}: is none of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
            )

    return rule


def constant(module: str, name: str) -> Rule:
    """One of the texts in a constant of a module of the package."""
    return one_of(functools.partial(catalogue.constant, f"efficientllm.{module}", name))


def check_regex(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A regular expression."""
    patterns.compile(value, where)


def tuple_of(element_rule: Rule) -> Rule:
    """A tuple of texts that each pass `element_rule`."""

    def rule(where, value, has_plugins):
        for text in value:
            if not isinstance(text, str):
                raise UserError(
                    f"{where} = {short_repr(value)}: must be a tuple of texts, not of {type(text).__name__}"
                )
            element_rule(where, text, has_plugins)

    return rule


def list_of(element_rule: Rule) -> Rule:
    """A text of names with commas between them, each of which passes `element_rule`."""

    def rule(where, value, has_plugins):
        for name in filter(None, map(str.strip, value.split(","))):
            element_rule(where, name, has_plugins)

    return rule


def accept_text(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Any text."""


def check_nonempty(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Text that is not empty."""
    if not value:
        raise UserError(f"{where}: holds an empty text; leave it out")


def regex_pairs(what: str, value_rule: Rule) -> Rule:
    """A tuple of (regex, value) pairs whose values pass `value_rule`; `what` names the value in messages."""

    def rule(where, value, has_plugins):
        for pair in value:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise UserError(
                    f"{where} = {short_repr(value)}: must be pairs of (regex, {what}); {short_repr(pair)} is not"
                )
            check_regex(where, pair[0])
            value_rule(where, pair[1], has_plugins)

    return rule


def number(allowed: ranges.Range) -> Rule:
    """A number in the range `allowed`."""

    def rule(where, value, has_plugins):
        if type(value) not in (int, float):
            raise UserError(f"{where} = {short_repr(value)}: must be {allowed}")
        ranges.check_range(where, value, allowed)

    return rule


def numbers(allowed: ranges.Range) -> Rule:
    """A tuple of numbers in the range `allowed`."""

    def rule(where, value, has_plugins):
        ranges.check_range(where, value, ranges.TupleOf(allowed))

    return rule


def sizes(allowed: ranges.Range) -> Rule:
    """A tuple of (height, width) pairs, each number in the range `allowed`."""

    def rule(where, value, has_plugins):
        for pair in value:
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise UserError(
                    f"{where} = {short_repr(value)}: must be pairs of (height, width); {short_repr(pair)} is not"
                )
            ranges.check_range(where, tuple(pair), ranges.TupleOf(allowed))

    return rule
