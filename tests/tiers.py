"""Parametrized cases of the full tier: `slow_case` and `slow_except`."""

import pytest


def slow_case(*values, id=None):
    """A case for `pytest.mark.parametrize` that the full tier runs and the default run does not."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def slow_except(cases, *default):
    """The cases, of which only those in `default` run by default; a case of several values is a tuple."""
    unknown = [case for case in default if case not in cases]
    assert not unknown, f"no cases: {unknown}"
    slow = (slow_case(*case) if isinstance(case, tuple) else slow_case(case) for case in cases)
    return [case if case in default else marked for case, marked in zip(cases, slow, strict=True)]
