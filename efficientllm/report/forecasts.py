"""The study's claims on plans: what the compiler alone says of memory and FLOPs, marked as predicted.

A plan's figures are a program's and need no interval. They stand apart from what rows measured (`claims`), and decide
nothing there; times and power are not judged, for a plan has only their bounds.
"""

from efficientllm.report import claims, statistics

# By the claim's metric: what a plan's row holds of it.
METRICS = {"amu_gb": ("predicted", "amu_gb"), "flops_per_token": ("physical", "flops_per_token")}
_EQUAL = ("model.remat", "model.precision", "mesh", "train.accumulate")
MARK = ", predicted"


def evaluate(groups):
    """The claims that plans among these groups say something of, as `claims.evaluate` has them."""
    planned = [group for group in groups if any(row.predicted for row in group.rows)]
    found = (_evaluate(claim, planned) for claim in claims.declared() if claim["metric"] in METRICS)
    return [each for each in found if each["pairs"]]


def _evaluate(claim, groups):
    found = claims.pairs(claim, groups, _pair)
    known = [pair["status"] for pair in found if "ratio" in pair]
    status = claims.OPEN
    if known:
        status = (claims.FAILS if claims.FAILS in known else claims.HOLDS) + MARK
    return claims.shown(claim) | {"status": status, "reason": claims.reasons(found), "pairs": found}


def _pair(claim, group, variant, other):
    a, b = (group.of(each)[0] for each in (variant, other))
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
    """As `claims.judge`, where a figure is exact and a difference within 2 % is still none."""
    if bound in ("< 1", "> 1") and 1 / (1 + statistics.MARGIN) <= ratio <= 1 + statistics.MARGIN:
        return claims.FAILS, "equal within ±2 %"
    return claims.judge(statistics.Interval(ratio, ratio, ratio, 1, "of two programs"), bound)
