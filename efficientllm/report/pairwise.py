"""Pairwise quality comparisons of a report: how many are significant, or bounded within 1 %, and how many are open."""

import itertools
import typing
from collections.abc import Iterable

from efficientllm.report.groups import Group

MARGIN = 0.01
METRICS = ("eval_loss", "perplexity")  # the first that variants of a group are compared by


def compare_quality(groups: Iterable[Group]) -> list[dict[str, typing.Any]]:
    """Counts the pairs of variants of each group by verdict; rows that stand in two groups count once.

    significant: the 95 % interval of the ratio excludes 1. bounded: it does not, and lies within ±1 %. open: neither.
    Pairs that may not be compared, and pairs of one block, are open too: nothing is known of them.
    """
    counts, counted = [], set()
    for group in groups:
        key = next((key for key in METRICS if len(group.ranked(key)) > 1), None)
        if key is None or any(row.predicted for row in group.rows):
            continue
        verdicts = []
        for pair in itertools.combinations(group.ranked(key), 2):
            paths = frozenset(str(row.path) for variant in pair for row in group.supplying(variant, key))
            if paths not in counted:
                counted.add(paths)
                verdicts.append(_verdict(group.between(key, *pair)[0]))
        if verdicts:
            tally = {verdict: verdicts.count(verdict) for verdict in ("significant", "bounded", "open")}
            counts.append({"group": group.name, "metric": key, "pairs": len(verdicts), **tally})
    return counts


def _verdict(interval):
    if interval is None or interval.low is None:
        return "open"
    if not interval.low <= 1 <= interval.high:
        return "significant"
    return "bounded" if interval.low >= 1 / (1 + MARGIN) and interval.high <= 1 + MARGIN else "open"


def format_share(counts: Iterable[dict[str, typing.Any]]) -> str:
    """Formats the counts of all groups as a sentence."""
    total = {key: sum(count[key] for count in counts) for key in ("pairs", "significant", "bounded", "open")}
    if not total["pairs"]:
        return "No two variants are compared by quality."
    share = (total["significant"] + total["bounded"]) / total["pairs"]
    return (
        f"Of {total['pairs']} pairwise comparisons of quality {share:.0%} are told: {total['significant']} "
        f"significant, {total['bounded']} bounded within ±{MARGIN:.0%}; {total['open']} are open."
    )
