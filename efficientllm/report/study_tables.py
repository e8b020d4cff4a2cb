"""Figures of the EfficientLLM study, compared with measured ratios to the same baseline."""

import functools
import importlib.resources
import json
import typing

from efficientllm.report import techniques
from efficientllm.report.groups import Group

TRUST = {
    "table": "from a table of the paper, through a digest, cross-checked",
    "site": "ranks of the project's web site",
    "figure": "read off a figure, ±0.005",
}
_METRICS = {"ppl": "perplexity"}


@functools.cache
def read_tables() -> dict[str, dict]:
    """Reads `{name: {"trust", "note", "rows"}}`, figures of EfficientLLM (arXiv:2505.13840); null is unknown."""
    text = importlib.resources.files("efficientllm.report").joinpath("data/study.json").read_text(encoding="utf-8")
    return json.loads(text)


def compare_with_study(group: Group) -> list[dict[str, typing.Any]]:
    """An entry for each table of the study that has this group's baseline and another of its variants."""
    leaders = {variant: group.of(variant)[0] for variant in group.variants}
    entries = []
    for axis in dict.fromkeys(techniques.study_axis(row) for row in leaders.values()):
        for name in techniques.TABLES[axis]:
            entry = _entry(group, leaders, axis, name)
            if entry and entry["rows"]:
                entries.append(entry)
    return entries


def _entry(group, leaders, axis, name):
    table = read_tables()[name]
    study_rows = {row["name"]: row for row in table["rows"]}
    if group.baseline is None:
        return None
    reference = study_rows.get(techniques.study_name(leaders[group.baseline], axis))
    if reference is None:
        return None
    rows = []
    for variant, row in leaders.items():
        study = study_rows.get(techniques.study_name(row, axis))
        if study and study is not reference:
            rows += [_pair(group, variant, study, reference, key) for key in study if key != "name"]
    return {
        "table": name,
        "axis": axis,
        "trust": TRUST[table["trust"]],
        "note": table.get("note", ""),
        "baseline": reference["name"],
        "rows": [row for row in rows if row],
    }


def _pair(group, variant, study, reference, key):
    """A metric's ratio in the study and here; None if either lacks the metric."""
    metric = _METRICS.get(key, key)
    if not study[key] or not reference.get(key) or all(metric not in row.values for row in group.rows):
        return None
    interval, reason = group.between(metric, variant, group.baseline)
    entry = {
        "variant": variant,
        "metric": metric,
        "study_value": study[key],
        "study_ratio": study[key] / reference[key],
    }
    if interval is None:
        return entry | {"reason": reason, "agrees": "not measured here"}
    ratio = {"ratio": interval.ratio, "low": interval.low, "high": interval.high}
    if group.withheld(metric, interval):
        return entry | ratio | {"agrees": "not decided here"}
    return entry | ratio | {"agrees": _agrees(entry["study_ratio"], interval)}


def _agrees(study_ratio, interval):
    if interval.low is None or interval.low <= 1 <= interval.high:
        return "not decided here"
    return "same side" if (study_ratio > 1) == (interval.ratio > 1) else "other side"
