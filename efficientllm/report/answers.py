"""Answers to standing questions, from the rows: the best variant under limits, the next one, and how sure that is.

A Question is a query of the page (`page/query.js`) over the rankings whose name and task fit. Its answer is computed
from the leaderboard, so that it changes with the rows; without rows it says which sweep would supply it.
"""

import dataclasses
import operator
import re
import typing
from collections.abc import Sequence

from efficientllm.report.columns import format_value

Group = dict[str, typing.Any]  # a group of a leaderboard
_SIGNS = {"<=": operator.le, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Limit:
    """A condition: a ratio to the baseline of at most (at least) `relative`, or a value of `absolute`, `shown` so."""

    key: str
    sign: str
    shown: str
    relative: float | None = None
    absolute: float | None = None

    @property
    def text(self) -> str:
        return f"{self.key} {self.sign} {self.shown}"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question in words, and the query that answers it in the rankings of `task` whose name matches `sweep`.

    supply: the command whose rows would answer it. Variants that do not match `variants` are left out.
    """

    asked: str
    task: str
    sweep: str
    goal: str
    most: bool = False
    limits: tuple[Limit, ...] = ()
    supply: str = ""
    variants: str = ""

    @property
    def query(self) -> str:
        conditions = " and ".join(limit.text for limit in self.limits)
        return f"{'most' if self.most else 'least'} {self.goal}{f' with {conditions}' if conditions else ''}"


def answer_questions(questions: Sequence[Question], board: dict[str, typing.Any]) -> list[dict[str, typing.Any]]:
    """Entries with `asked`, `query`, and `answers`, one a ranking, or `missing`, which says what would supply one."""
    units = {column["key"]: column["unit"] for column in board["columns"]}
    entries = []
    for question in questions:
        fitting = [g for g in board["groups"] if g["task"] == question.task and re.search(question.sweep, g["sweep"])]
        answers = [_answer(question, group, units) for group in fitting]
        missing = "" if any(answer["text"] for answer in answers) else f"No rows yet; {question.supply} supplies them."
        entries.append({"asked": question.asked, "query": question.query, "answers": answers, "missing": missing})
    return entries


def _answer(question, group, units):
    fit, out = [], []
    for variant in group["variants"]:
        if re.search(question.variants, variant["variant"]):
            verdicts = [_check(limit, variant, group, units) for limit in question.limits]
            problems = [problem for problem, _ in (_goal(question, variant, group), *verdicts) if problem]
            if problems:
                out.append(f"{variant['variant']}: {'; '.join(dict.fromkeys(problems))}")
            else:
                fit.append((variant, all(sure for _, sure in verdicts)))
    fit.sort(key=lambda pair: pair[0]["cells"][question.goal]["mean"] * (-1 if question.most else 1))
    entry = {"group": group["name"], "text": "", "next": "", "out": out}
    if not fit:
        return entry
    (best, sure), unit = fit[0], units[question.goal]
    text = f"{best['variant']}: {question.goal} {_shown(best['cells'][question.goal], unit)}"
    text += "".join(f", {limit.key} {_shown(best['cells'][limit.key], units[limit.key])}" for limit in question.limits)
    entry["text"] = text + ("" if sure else "; a limit lies within its interval: not certain")
    if len(fit) > 1:
        rest = [_shown_next(group, question, best, variant, unit) for variant, _ in fit[1:4]]
        entry["next"] = f"Next: {'; '.join(rest)}. {len(fit)} fit."
    return entry


def _goal(question, variant, group):
    cell = variant["cells"].get(question.goal)
    if cell is None or cell["mean"] is None:
        return f"{question.goal} is null ({cell['reason'] if cell else 'not recorded'})", True
    if cell["reason"] and variant["variant"] != group["baseline"]:
        return f"{question.goal} is not ranked ({cell['reason']})", True
    return "", True


def _check(limit, variant, group, units):
    """`(problem, sure)`: why a variant breaks a limit, or an empty text; unsure if the bound lies in its interval."""
    cell = variant["cells"].get(limit.key)
    if cell is None or cell["mean"] is None:
        return f"{limit.key} is null ({cell['reason'] if cell else 'not recorded'})", True
    is_baseline = variant["variant"] == group["baseline"]
    if cell["reason"] and not is_baseline:
        return f"{limit.key} is not compared ({cell['reason']})", True
    if limit.absolute is not None:
        value, bound, low, high = cell["mean"], limit.absolute, None, None
    else:
        value, bound = (1.0 if is_baseline else cell.get("ratio")), limit.relative
        low, high = cell.get("low"), cell.get("high")
    if value is None:
        return f"{limit.key} has no ratio", True
    sure = limit.absolute is not None or is_baseline or (low is not None and not low <= bound <= high)
    ok = _SIGNS[limit.sign](value, bound)
    return ("" if ok else f"{limit.key} is {_shown(cell, units[limit.key])}"), sure


def _shown(cell, unit):
    """`2.31 nat (×0.985, 0.972–0.998 of the baseline's, n = 3)`."""
    text = format_value(cell["mean"], unit)
    if cell.get("low") is not None:
        return f"{text} (×{cell['ratio']:.3f}, {cell['low']:.3f}–{cell['high']:.3f} of the baseline's, n = {cell['n']})"
    if "ratio" in cell:
        return f"{text} (×{cell['ratio']:.3f} of the baseline's, no interval, n = {cell['n']})"
    return f"{text} (n = {cell['n']})"


def _shown_next(group, question, best, variant, unit):
    """The next variant, with the probability that the best one is ahead of it."""
    shares = group["wins"].get(question.goal, {}).get(best["variant"], {})
    text = f"{variant['variant']} {_shown(variant['cells'][question.goal], unit)}"
    share = shares.get(variant["variant"])
    return text if share is None else f"{text}, behind with a probability of {share:.0%}"
