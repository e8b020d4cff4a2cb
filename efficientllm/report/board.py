"""The leaderboard: everything a report says, as plain data that the texts, figures and the page only show."""

import itertools

import numpy as np

from efficientllm.report import (
    claims,
    columns,
    comparison,
    forecasts,
    ranking,
    statistics,
    study,
    techniques,
    unfinished,
)

SCHEMA_VERSION = 1
NOISE = ("al_s", "tokens_per_s", "it_tokens_per_s", "j_per_token", "aec_w", "amu_gb", "peak_memory_bytes", "eval_loss")
_PARETO_DRAWS = 2000


def build(rows, orphans=(), baseline=None):
    """The leaderboard of these rows as plain data, the same for the same rows."""
    shown = columns.columns(rows)
    found = comparison.groups(rows, baseline)
    return {
        "schema_version": SCHEMA_VERSION,
        "columns": [
            {"key": c.key, "label": c.label, "unit": c.unit, "better": c.better, "group": c.group} for c in shown
        ],
        "groups": [_group(group, shown) for group in found],
        "claims": claims.evaluate(found),
        "forecasts": forecasts.evaluate(found),
        "failures": [_failure(row) for row in rows if not row.ok],
        "without_row": unfinished.unfinished(orphans),
        "rows": len(rows),
    }


def _failure(row):
    return {
        "variant": row.variant,
        "outcome": row.outcome,
        "block": row.block,
        "path": str(row.path),
        "tail": row.tail(),
        "said": next((line.strip() for line in reversed(row.tail().splitlines()) if line.strip()), ""),
    }


def _group(group, shown):
    cells, wins = {}, {}
    for column in shown:
        cells[column.key], wins[column.key] = group.compare(column.key, column.better)
    better = {column.key: column.better for column in shown}
    six = columns.six(group.task)
    scores, parts = _scores(group, cells, six, better)
    normalised = _normalised(group, cells, six, better)
    return {
        "name": group.name,
        "sweep": group.sweep,
        "task": group.task,
        "device": group.device,
        "batch": group.batch,
        "baseline": group.baseline,
        "blocks": len(group.blocks),
        "six": list(six),
        "variants": [
            _variant(group, variant)
            | {"cells": {key: column[variant] for key, column in cells.items()}}
            | {"efficiency_score": scores.get(variant), "normalised": normalised[variant]}
            for variant in group.variants
        ],
        "score": {"of": parts, "over": list(scores)},
        "wins": {key: share for key, share in wins.items() if share},
        "pareto": _pareto(group, [column for column in shown if column.better]),
        "noise": {key: found for key in NOISE if (found := _noise(group, key))},
        "study": study.beside(group),
    }


def _variant(group, variant):
    rows = group.of(variant)
    outcomes = [row.outcome for row in rows]
    return {
        "variant": variant,
        "axis": techniques.axis(rows[0]),
        "scale": rows[0].config.get("model.size"),
        "techniques": techniques.techniques(rows[0]),
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "paths": [str(row.path) for row in rows],
        "notes": _notes(rows),
    }


def _notes(rows):
    """What a reader of these rows' times must know, each once with the rows it holds for, if not for all."""
    said = {}
    for row in (row for row in rows if row.ok):
        for note in row.notes():
            said.setdefault(note, []).append(row.block)
    notes = [f"{', '.join(dict.fromkeys(blocks))}: {note}" for note, blocks in said.items()]
    commits = {(row.record["provenance"].get("git") or {}).get("commit") for row in rows if row.ok} - {None}
    return notes + ([f"rows of {len(commits)} commits of the program"] if len(commits) > 1 else [])


def _scores(group, cells, six, better):
    """`({variant: score}, parts)`: Eq. 12 over the variants that have AMU, AL and throughput."""
    names = {key: "throughput" if key == six[3] else key for key in six[:5]}
    needed = [cells[key] for key in (six[0], six[2], six[3])]
    able = [v for v in group.variants if all(_value(group, cell[v], v) is not None for cell in needed)]
    table = {name: [_value(group, cells[key][v], v) for v in able] for key, name in names.items()}
    scores, parts = ranking.efficiency_scores(table, {name: better[key] for key, name in names.items()})
    keys = {name: key for key, name in names.items()}
    return dict(zip(able, scores, strict=False)), [keys[part] for part in parts]


def _normalised(group, cells, six, better):
    values = {key: [_value(group, cells[key][v], v) for v in group.variants] for key in six}
    table = {key: ranking.normalised(values[key], better[key]) for key in six}
    return {variant: {key: table[key][i] for key in six} for i, variant in enumerate(group.variants)}


def _value(group, cell, variant):
    """A variant's mean, or None where it may not stand beside the baseline's."""
    refused = cell["reason"] and group.baseline is not None and variant != group.baseline
    return None if refused else cell["mean"]


def _pareto(group, shown):
    """`{"x|y": {variant: probability of being non-dominated}}`; null where one block leaves it open."""
    ranked = {column.key: group.ranked(column.key) for column in shown}
    found, drawn = {}, {}

    def draws(key, variants):
        at = (key, variants)
        if at not in drawn:
            drawn[at] = statistics.draws(group.logs(key, variants), _PARETO_DRAWS)
        return drawn[at]

    for x, y in itertools.combinations(shown, 2):
        both = tuple(variant for variant in ranked[x.key] if variant in ranked[y.key])
        if len(both) < 2 or len(both) > ranking.MANY:
            continue
        if group.is_sure(x.key, both) and group.is_sure(y.key, both):
            shares = ranking.non_dominated(draws(x.key, both), draws(y.key, both), x.better, y.better)
            found[f"{x.key}|{y.key}"] = dict(zip(both, np.round(shares, 3).tolist(), strict=True))
        else:
            found[f"{x.key}|{y.key}"] = dict.fromkeys(both)
    return found


def _noise(group, key):
    found = group.noise(key)
    return found and {
        "ratio": found.interval.ratio,
        "low": found.interval.low,
        "high": found.interval.high,
        "pairs": found.interval.blocks,
        "spread": float(found.spread),
        "smallest_effect": found.smallest,
        "blocks_for_3_percent": found.blocks_for_3,
    }
