"""The study's headline claims as named checks over whatever rows were measured; data/claims.json declares them.

A claim compares a metric of the variants `of` with that of those `against`, pair by pair, where nothing else differs:
it holds if every measured pair's 95 % interval lies on the claimed side of its bound, it does not hold if one lies
wholly on the other side (or is equal within 2 % where a difference is claimed), and else it cannot be tested here. The
reason names the pairs that decided nothing.
"""

import functools
import importlib.resources
import json
import operator
import re

from efficientllm.report import statistics
from efficientllm.report.comparison import device
from efficientllm.report.techniques import techniques

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be tested here"
_SIDES = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@functools.cache
def declared():
    """The claims, as the file declares them."""
    text = importlib.resources.files("efficientllm.report").joinpath("data/claims.json").read_text(encoding="utf-8")
    return json.loads(text)


def evaluate(groups):
    """Every claim with its `status`, `reason` and `pairs` (each with ratio and interval). Plans decide nothing here:
    `forecasts` has what they say."""
    measured = [group for group in groups if not any(row.predicted for row in group.rows)]
    return [_evaluate(claim, measured) for claim in declared()]


def _evaluate(claim, groups):
    found = pairs(claim, groups, _pair)
    measured = [pair for pair in found if "ratio" in pair]
    if any(pair["status"] == FAILS for pair in measured):
        status = FAILS
    else:
        status = HOLDS if measured and all(pair["status"] == HOLDS for pair in measured) else OPEN
    reason = reasons(found) if found else _why_open(claim, groups)
    return shown(claim) | {"status": status, "reason": reason, "pairs": found}


def shown(claim):
    """What a report repeats of a declared claim."""
    own = {key: claim[key] for key in ("name", "where", "metric", "ratio", "table")}
    says = f"“{claim['quote']}”" if "quote" in claim else claim["says"]
    return own | {"says": says, "note": claim.get("note", "")}


def pairs(claim, groups, judged):
    """`judged(claim, group, variant, other)` of every two variants that the claim compares, nothing else differing."""
    return [judged(claim, group, *pair) for group in groups for pair in _pairs(claim, group)]


def _pairs(claim, group):
    leaders = {variant: (group.of(variant)[0], techniques(group.of(variant)[0])) for variant in group.variants}
    others = {other: against for other, (_, against) in leaders.items() if _is(against, claim["against"])}
    for variant, (row, used) in leaders.items():
        if _is(used, claim["of"]) and not _outside(claim, row):
            for other, against in others.items():
                if _only_differ_in(used, against, claim["of"]):
                    yield variant, other


def _is(used, asked):
    return all(used[kind] in ([names] if isinstance(names, str) else names) for kind, names in asked.items())


def _only_differ_in(used, against, kinds):
    return all(used[kind] == against[kind] for kind in used if kind not in kinds)


def _outside(claim, row):
    """Why a row lies outside of what the claim speaks of, or None."""
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


def _pair(claim, group, variant, other):
    interval, reason = group.between(claim["metric"], variant, other)
    pair = {"group": group.name, "variant": variant, "against": other}
    if interval is None:
        return pair | {"status": OPEN, "reason": reason}
    ratio = {"ratio": interval.ratio, "low": interval.low, "high": interval.high, "blocks": interval.blocks}
    status, reason = judge(interval, claim["ratio"])
    if status != OPEN and (withheld := group.withheld(claim["metric"], interval, float(claim["ratio"].split()[1]))):
        status, reason = OPEN, withheld
    return pair | ratio | {"status": status, "reason": reason}


def judge(interval, bound):
    """`(status, reason)` of an interval against a bound such as `< 1` or `>= 3.7`."""
    sign, limit = bound.split()
    inside, limit = _SIDES[sign], float(limit)
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


def reasons(pairs):
    """Why pairs decided nothing, or that they are equal; each reason once."""
    return "; ".join(dict.fromkeys(f"{p['variant']} / {p['against']}: {p['reason']}" for p in pairs if p["reason"]))


def _why_open(claim, groups):
    """Why not one pair was found."""
    rows = [row for group in groups for row in group.rows]
    for side in (claim["of"], claim["against"]):
        if not any(_is(techniques(row), side) for row in rows):
            ((kind, names),) = side.items()
            return f"no row with {kind} {names if isinstance(names, str) else ' or '.join(names)}"
    of = [row for row in rows if _is(techniques(row), claim["of"])]
    return next(filter(None, (_outside(claim, row) for row in of)), "no two rows differ in this alone")
