"""Answers to standing questions, from the rows: the best variant under limits, the next one, and how sure that is.

A Question is a query (`report.query`) over the rankings whose name and task fit. Its answer is computed
from the leaderboard, so that it changes with the rows; without rows it says which sweep would supply it.
"""

import dataclasses
import re
import typing
from collections.abc import Sequence

from efficientllm.report.columns import Column, format_value
from efficientllm.report.query import parse_query

Group = dict[str, typing.Any]  # a group of a leaderboard


@dataclasses.dataclass(frozen=True)
class Question:
    """A question in words, and the query that answers it in the rankings of `task` whose name matches `sweep`.

    supply: the command whose rows would answer it. Variants that do not match `variants` are left out.
    """

    asked: str
    task: str
    sweep: str
    query: str
    supply: str = ""
    variants: str = ""


def answer_questions(questions: Sequence[Question], board: dict[str, typing.Any]) -> list[dict[str, typing.Any]]:
    """Entries with `asked`, `query`, and `answers`, one a ranking, or `missing`, which says what would supply one."""
    columns = {column["key"]: Column(column["key"], column["unit"], None, None) for column in board["columns"]}
    units = {key: column.unit for key, column in columns.items()}
    entries = []
    for question in questions:
        fitting = [g for g in board["groups"] if g["task"] == question.task and re.search(question.sweep, g["sweep"])]
        query = parse_query(question.query, columns) if fitting else None
        answers = [_answer(question, query, group, units) for group in fitting]
        missing = "" if any(answer["text"] for answer in answers) else f"No rows yet; {question.supply} supplies them."
        entries.append({"asked": question.asked, "query": question.query, "answers": answers, "missing": missing})
    return entries


def _answer(question, query, group, units):
    fit, out = [], []
    for variant in group["variants"]:
        if re.search(question.variants, variant["variant"]):
            verdicts = [_check(limit, variant, group, units) for limit in query.conditions]
            problems = [problem for problem, _ in (_goal(query, variant, group), *verdicts) if problem]
            if problems:
                out.append(f"{variant['variant']}: {'; '.join(dict.fromkeys(problems))}")
            else:
                fit.append((variant, all(sure for _, sure in verdicts)))
    fit.sort(key=lambda pair: pair[0]["cells"][query.goal]["mean"] * (-1 if query.most else 1))
    entry = {"group": group["name"], "text": "", "next": "", "out": out}
    if not fit:
        return entry
    (best, sure), unit = fit[0], units[query.goal]
    text = f"{best['variant']}: {query.goal} {_shown(best['cells'][query.goal], unit)}"
    text += "".join(f", {limit.key} {_shown(best['cells'][limit.key], units[limit.key])}" for limit in query.conditions)
    entry["text"] = text + ("" if sure else "; not certain: a limit lies within an interval, or there is none")
    if len(fit) > 1:
        rest = [_shown_next(group, query, best, variant, unit) for variant, _ in fit[1:4]]
        entry["next"] = f"Next: {'; '.join(rest)}. {len(fit)} fit."
    return entry


def _goal(query, variant, group):
    cell = variant["cells"].get(query.goal)
    if cell is None or cell["mean"] is None:
        return f"{query.goal} is null ({cell['reason'] if cell else 'not recorded'})", True
    if cell["reason"] and variant["variant"] != group["baseline"]:
        return f"{query.goal} is not ranked ({cell['reason']})", True
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
    return ("" if limit.holds(value) else f"{limit.key} is {_shown(cell, units[limit.key])}"), sure


def _shown(cell, unit):
    """`2.31 nat (×0.985, 0.972–0.998 of the baseline's, n = 3)`."""
    text = format_value(cell["mean"], unit)
    if cell.get("low") is not None and f"{cell['low']:.3f}" == f"{cell['high']:.3f}":
        return f"{text} (×{cell['ratio']:.3f} of the baseline's)"
    if cell.get("low") is not None:
        return f"{text} (×{cell['ratio']:.3f}, {cell['low']:.3f}–{cell['high']:.3f} of the baseline's, n = {cell['n']})"
    if "ratio" in cell:
        return f"{text} (×{cell['ratio']:.3f} of the baseline's, no interval, n = {cell['n']})"
    return f"{text} (n = {cell['n']})"


def _shown_next(group, query, best, variant, unit):
    """The next variant, with the probability that the best one is ahead of it."""
    shares = group["wins"].get(query.goal, {}).get(best["variant"], {})
    text = f"{variant['variant']} {_shown(variant['cells'][query.goal], unit)}"
    share = shares.get(variant["variant"])
    return text if share is None else f"{text}, behind with a probability of {share:.0%}"
