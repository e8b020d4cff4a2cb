"""The study's claims checked on plans: memory and FLOPs that the compiler predicts.

A plan's figures are exact and need no interval. They are kept apart from measured claims (`claims`). Times and power
are not judged: a plan has only bounds of them.
"""

import typing
from collections.abc import Sequence

from efficientllm.report import claims, statistics
from efficientllm.report.groups import Group

# Group and key of a plan's row, by the claim's metric.
METRICS = {"amu_gb": ("predicted", "amu_gb"), "flops_per_token": ("physical", "flops_per_token")}
_EQUAL = ("model.remat", "model.precision", "mesh", "train.accumulate")
MARK = ", predicted"


def evaluate_plans(groups: Sequence[Group]) -> list[dict[str, typing.Any]]:
    """The claims that planned rows can test, in the form of `claims.evaluate_claims`."""
    planned = [group for group in groups if any(row.predicted for row in group.rows)]
    results = (_evaluate(claim, planned) for claim in claims.read_claims() if claim["metric"] in METRICS)
    return [result for result in results if result["pairs"]]


def _evaluate(claim, groups):
    judged_pairs = claims.judge_pairs(claim, groups, _pair)
    statuses = [pair["status"] for pair in judged_pairs if "ratio" in pair]
    status = claims.OPEN
    if statuses:
        status = (claims.FAILS if claims.FAILS in statuses else claims.HOLDS) + MARK
    return claims.describe_claim(claim) | {
        "status": status,
        "reason": claims.join_reasons(judged_pairs),
        "takes": "",
        "pairs": judged_pairs,
    }


def _pair(claim, group, variant, other):
    a, b = (group.of(name)[0] for name in (variant, other))
    pair = {"group": group.name, "variant": variant, "against": other}
    if differ := [key for key in _EQUAL if a.config.get(key) != b.config.get(key)]:
        return pair | {"status": claims.OPEN, "reason": f"they differ in {', '.join(differ)} too"}
    values = [_value(row, claim["metric"]) for row in (a, b)]
    if None in values:
        return pair | {"status": claims.OPEN, "reason": f"no {claim['metric']} in one of the plans"}
    ratio = values[0] / values[1]
    status, reason = _judge(ratio, claim["ratio"])
    return pair | {"ratio": ratio, "low": ratio, "high": ratio, "blocks": 1, "status": status, "reason": reason}


def _value(row, metric):
    group, key = METRICS[metric]
    return row.record[group].get(key)


def _judge(ratio, bound):
    """Like `claims.judge_interval` for an exact ratio; a difference within 2 % still counts as equal."""
    if bound in ("< 1", "> 1") and 1 / (1 + statistics.MARGIN) <= ratio <= 1 + statistics.MARGIN:
        return claims.FAILS, "equal within ±2 %"
    return claims.judge_interval(statistics.Interval(ratio, ratio, ratio, 1, "of two programs"), bound)
