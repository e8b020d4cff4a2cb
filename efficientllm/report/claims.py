"""The study's headline claims, checked against measured rows; data/claims.json declares them.

A claim compares a metric of the variants `of` with that of the variants `against`, in pairs that differ in nothing
else but the kinds of `besides`. It holds if the 95 % interval of every measured pair lies on the claimed side of the
bound. It does not hold if one interval lies on the other side (or is equal within 2 % where a difference is claimed).
Otherwise it cannot be tested here, and the reason names the undecided pairs.
"""

import collections
import functools
import importlib.resources
import json
import operator
import re
import typing
from collections.abc import Callable, Sequence

from efficientllm.report import statistics
from efficientllm.report.groups import Group, device
from efficientllm.report.techniques import techniques

Claim = dict[str, typing.Any]  # an entry of data/claims.json
_MOST_BLOCKS = 1000
_MOST_NAMED = 4  # pairs that have the same reason
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be tested here"
_SIDES = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@functools.cache
def read_claims() -> list[Claim]:
    """Reads the declared claims."""
    text = importlib.resources.files("efficientllm.report").joinpath("data/claims.json").read_text(encoding="utf-8")
    return json.loads(text)


def evaluate_claims(groups: Sequence[Group]) -> list[dict[str, typing.Any]]:
    """Every claim with its `status`, `reason` and `pairs` (each with ratio and interval).

    Only measured rows count; `planned_claims` judges plans.
    """
    measured = [group for group in groups if not any(row.predicted for row in group.rows)]
    return [_evaluate(claim, measured) for claim in read_claims()]


def _evaluate(claim, groups):
    judged_pairs = judge_pairs(claim, groups, _judge_pair)
    measured = [pair for pair in judged_pairs if "ratio" in pair]
    if any(pair["status"] == FAILS for pair in measured):
        status = FAILS
    else:
        status = HOLDS if measured and all(pair["status"] == HOLDS for pair in measured) else OPEN
    reason = join_reasons(judged_pairs) if judged_pairs else _why_open(claim, groups)
    takes = _what_it_takes(claim, measured) if status == OPEN else ""
    return describe_claim(claim) | {"status": status, "reason": reason, "takes": takes, "pairs": judged_pairs}


def _what_it_takes(claim, pairs):
    """How many blocks would decide the open pairs of a claim if their ratios are what they seem."""
    limit, needs = float(claim["ratio"].split()[1]), []
    for pair in pairs:
        if pair["status"] == OPEN:
            interval = statistics.Interval(pair["ratio"], pair["low"], pair["high"], pair["blocks"], "")
            blocks = statistics.blocks_to_decide(interval, limit, _MOST_BLOCKS)
            without = "two blocks or more" if interval.low is None else "more held-out text"
            more = without if blocks is None else f"{blocks:,} blocks"
            more = f"more than {_MOST_BLOCKS:,} blocks" if blocks == _MOST_BLOCKS else more
            needs.append((more, pair))
    return _pairs_by_text(needs)


def describe_claim(claim: Claim) -> dict[str, typing.Any]:
    """The fields of a declared claim that a report shows."""
    fields = {key: claim[key] for key in ("name", "where", "metric", "ratio", "table")}
    says = f"“{claim['quote']}”" if "quote" in claim else claim["says"]
    return fields | {"says": says, "note": claim.get("note", "")}


def judge_pairs(
    claim: Claim, groups: Sequence[Group], judge_pair: Callable[[Claim, Group, str, str], dict]
) -> list[dict[str, typing.Any]]:
    """Results of `judge_pair(claim, group, variant, other)` for every pair that the claim compares."""
    return [judge_pair(claim, group, *pair) for group in groups for pair in _pairs(claim, group)]


def _pairs(claim, group):
    leaders = {variant: (group.of(variant)[0], techniques(group.of(variant)[0])) for variant in group.variants}
    others = {other: against for other, (_, against) in leaders.items() if _uses(against, claim["against"])}
    for variant, (row, used) in leaders.items():
        if _uses(used, claim["of"]) and not _outside(claim, row):
            for other, against in others.items():
                if _only_differ_in(used, against, (*claim["of"], *claim.get("besides", ()))):
                    yield variant, other


def _uses(used, required):
    return all(used[kind] in ([names] if isinstance(names, str) else names) for kind, names in required.items())


def _only_differ_in(used, against, kinds):
    return all(used[kind] == against[kind] for kind in used if kind not in kinds)


def _outside(claim, row):
    """Why the claim does not apply to a row, or None. A claim speaks of text unless it says otherwise."""
    if row.reads != claim.get("reads", "text"):
        return f"it speaks of models of {claim.get('reads', 'text')}"
    for bound, sign in (("at_least", 1), ("at_most", -1)):
        for key, limit in claim.get(bound, {}).items():
            value = row.values.get(key)
            if value is None or sign * value < sign * limit:
                return f"it speaks of {key} {bound.replace('_', ' ')} {limit:.3g}; here it is {value or 0:.3g}"
    if not re.search(claim.get("device", ""), device(row)):
        return f"it speaks of {claim['device'].replace('|', ', ')}; here it is {device(row)}"
    if not re.search(claim.get("model", ""), str(row.config.get("model.pretrained")), re.IGNORECASE):
        return f"it speaks of models named {claim['model'].replace('|', ', ')}"
    return None


def _judge_pair(claim, group, variant, other):
    interval, reason = group.between(claim["metric"], variant, other)
    pair = {"group": group.name, "variant": variant, "against": other}
    if interval is None:
        return pair | {"status": OPEN, "reason": reason}
    ratio = {"ratio": interval.ratio, "low": interval.low, "high": interval.high, "blocks": interval.blocks}
    status, reason = judge_interval(interval, claim["ratio"])
    if status != OPEN and (withheld := group.withheld(claim["metric"], interval, float(claim["ratio"].split()[1]))):
        status, reason = OPEN, withheld
    return pair | ratio | {"status": status, "reason": reason}


def judge_interval(interval: statistics.Interval, bound: str) -> tuple[str, str]:
    """`(status, reason)` of an interval for a bound such as `< 1` or `>= 3.7`."""
    sign, number = bound.split()
    inside, limit = _SIDES[sign], float(number)
    if interval.low is None:
        return OPEN, "one block: no interval"
    if inside(interval.low, limit) and inside(interval.high, limit):
        return HOLDS, ""
    if not inside(interval.low, limit) and not inside(interval.high, limit):
        return FAILS, "the interval lies on the other side"
    if limit == 1 and statistics.verdict(interval, None).startswith("equal"):
        if sign in ("<", ">"):
            return FAILS, "equal within ±2 %"
        return HOLDS, "equal within ±2 %"
    return OPEN, f"the interval {interval.low:.3g} to {interval.high:.3g} holds {limit:g}: not decided"


def join_reasons(pairs: Sequence[dict]) -> str:
    """Joins the reasons of the pairs, each once, with the pairs that it speaks of."""
    return _pairs_by_text([(pair["reason"], pair) for pair in pairs if pair["reason"]])


def _pairs_by_text(told):
    """`text: the pairs of it` for each text of `told`, (text, pair); of many pairs the first _MOST_NAMED."""
    pairs_by_text = collections.defaultdict(dict)
    for text, pair in told:
        pairs_by_text[text][f"{pair['variant']} / {pair['against']}"] = None
    return "; ".join(f"{_some(list(pairs))}: {text}" for text, pairs in pairs_by_text.items())


def _some(names):
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _why_open(claim, groups):
    """Why the rows hold no pair that the claim compares."""
    rows = [row for group in groups for row in group.rows]
    for side in (claim["of"], claim["against"]):
        if not any(_uses(techniques(row), side) for row in rows):
            ((kind, names),) = side.items()
            return f"no row with {kind} {names if isinstance(names, str) else ' or '.join(names)}"
    candidates = [row for row in rows if _uses(techniques(row), claim["of"])]
    return next(filter(None, (_outside(claim, row) for row in candidates)), "no two rows differ in this alone")
