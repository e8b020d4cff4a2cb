"""The study's own rows beside ours: ratios to the same baseline, with how far its table can be trusted."""

import functools
import importlib.resources
import json

from efficientllm.report import techniques

TRUST = {
    "table": "from a table of the paper, through a digest, cross-checked",
    "site": "ranks of the project's web site",
    "figure": "read off a figure, ±0.005",
}
_OURS = {"ppl": "perplexity"}


@functools.cache
def tables():
    """`{name: {"trust", "note", "rows"}}`: figures that EfficientLLM (arXiv:2505.13840) reports; null is not known."""
    text = importlib.resources.files("efficientllm.report").joinpath("data/study.json").read_text(encoding="utf-8")
    return json.loads(text)


def beside(group):
    """One entry for each of the study's tables that holds this group's baseline and another of its variants."""
    leaders = {variant: group.of(variant)[0] for variant in group.variants}
    found = []
    for axis in dict.fromkeys(techniques.axis(row) for row in leaders.values()):
        for name in techniques.TABLES[axis]:
            entry = _entry(group, leaders, axis, name)
            if entry and entry["rows"]:
                found.append(entry)
    return found


def _entry(group, leaders, axis, name):
    table = tables()[name]
    theirs = {row["name"]: row for row in table["rows"]}
    if group.baseline is None:
        return None
    reference = theirs.get(techniques.study_name(leaders[group.baseline], axis))
    if reference is None:
        return None
    rows = []
    for variant, row in leaders.items():
        study = theirs.get(techniques.study_name(row, axis))
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
    """A metric's ratio in the study and here; None where the study has no figure or ours has no such metric."""
    ours = _OURS.get(key, key)
    if not study[key] or not reference.get(key) or all(ours not in row.values for row in group.rows):
        return None
    interval, reason = group.between(ours, variant, group.baseline)
    entry = {"variant": variant, "metric": ours, "study_value": study[key], "study_ratio": study[key] / reference[key]}
    if interval is None:
        return entry | {"reason": reason, "agrees": "not measured here"}
    ratio = {"ratio": interval.ratio, "low": interval.low, "high": interval.high}
    if group.withheld(ours, interval):
        return entry | ratio | {"agrees": "not decided here"}
    return entry | ratio | {"agrees": _agrees(entry["study_ratio"], interval)}


def _agrees(study_ratio, interval):
    if interval.low is None or interval.low <= 1 <= interval.high:
        return "not decided here"
    return "same side" if (study_ratio > 1) == (interval.ratio > 1) else "other side"
