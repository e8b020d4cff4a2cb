"""The leaderboard: the whole content of a report as plain data. Markdown, figures and the page only display it."""

import itertools
import pathlib
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.config.differences import differences
from efficientllm.report import (
    claims,
    columns,
    groups,
    joined_sweeps,
    pairwise,
    planned_claims,
    ranking,
    statistics,
    study_tables,
    techniques,
    unfinished,
)
from efficientllm.report.rows import Row
from efficientllm.report.variant_names import compared_config

SCHEMA_VERSION = 1
_OF_IMAGES = ("images_per_s", "j_per_image", "fd_own")
_OF_TEXT = ("tokens_per_s", "it_tokens_per_s", "j_per_token")
NOISE = ("al_s", *_OF_TEXT, "aec_w", "amu_gb", "peak_memory_bytes", "eval_loss", *_OF_IMAGES)
_PARETO_DRAWS = 2000
_TEXTS = ("infer.prompts", "infer.negative_prompt", "infer.stop", "command")


def build_leaderboard(
    rows: Sequence[Row], orphans: Sequence[pathlib.Path] = (), baseline: str | None = None
) -> dict[str, typing.Any]:
    """Builds the leaderboard of these rows; deterministic.

    orphans:  run folders without a row.
    baseline: see `groups.group_rows`.
    """
    shown = columns.list_columns(rows)
    all_groups = groups.group_rows(rows, baseline)
    return {
        "schema_version": SCHEMA_VERSION,
        "columns": [
            {"key": c.key, "label": c.label, "unit": c.unit, "better": c.better, "group": c.group} for c in shown
        ],
        "groups": [_group(group, shown) for group in all_groups],
        "claims": claims.evaluate_claims(all_groups),
        "forecasts": planned_claims.evaluate_plans(all_groups),
        "pairwise": pairwise.compare_quality(all_groups),
        "failures": [_failure(row) for row in rows if not row.ok],
        "without_row": unfinished.list_unfinished(orphans),
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
    six, parts = columns.study_metrics(group.task), joined_sweeps.describe_parts(group.rows)
    scores, scored = _scores(group, cells, six, better)
    normalised = _normalised(group, cells, six, better)
    return {
        "name": group.name,
        "sweep": group.sweep,
        "task": group.task,
        "device": group.device,
        "batch": group.batch,
        "baseline": group.baseline,
        "blocks": len(group.blocks),
        "parts": parts,
        "setting": joined_sweeps.format_parts(parts),
        "six": list(six),
        "variants": [
            _variant(group, variant)
            | {"cells": {key: column[variant] for key, column in cells.items()}}
            | {"efficiency_score": scores.get(variant), "normalised": normalised[variant]}
            for variant in group.variants
        ],
        "score": {"of": scored, "over": list(scores)},
        "wins": {key: share for key, share in wins.items() if share},
        "pareto": _pareto(group, [column for column in shown if column.better and not columns.is_level(column.key)]),
        "noise": {key: noise for key in NOISE if (noise := _noise(group, key))},
        "study": study_tables.compare_with_study(group),
    }


def _variant(group, variant):
    rows = group.of(variant)
    outcomes = [row.outcome for row in rows]
    return {
        "variant": variant,
        "axis": techniques.study_axis(rows[0]),
        "scale": rows[0].config.get("model.size"),
        "techniques": techniques.techniques(rows[0]),
        "config": _changed(rows[0]),
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "paths": [str(row.path) for row in rows],
        "notes": _notes(rows),
    }


def _changed(row):
    """The compared keys of a row's config that differ from the base config, with their values; texts are left out."""
    compared = compared_config(row.config)
    return {key: compared[key] for key in differences(compared) if key not in _TEXTS}


def _notes(rows):
    """The rows' notes, each once, with the blocks that it applies to."""
    blocks_by_note = {}
    timed = (row for row in rows if row.ok and joined_sweeps.measures(row) != joined_sweeps.QUALITY)
    for row in timed:
        for note in row.notes():
            blocks_by_note.setdefault(note, []).append(row.block)
    notes = [f"{', '.join(dict.fromkeys(blocks))}: {note}" for note, blocks in blocks_by_note.items()]
    commits = {(row.record["provenance"].get("git") or {}).get("commit") for row in rows if row.ok} - {None}
    return notes + ([f"rows of {len(commits)} commits of the program"] if len(commits) > 1 else [])


def _scores(group, cells, six, better):
    """`({variant: score}, metrics)`: Eq. 12 over the variants that have AMU, AL and throughput."""
    names = {key: "throughput" if key == six[3] else key for key in six[:5]}
    required_cells = [cells[key] for key in (six[0], six[2], six[3])]
    eligible = [v for v in group.variants if all(_value(group, cell[v], v) is not None for cell in required_cells)]
    table = {name: [_value(group, cells[key][v], v) for v in eligible] for key, name in names.items()}
    scores, scored = ranking.efficiency_scores(table, {name: better[key] for key, name in names.items()})
    keys = {name: key for key, name in names.items()}
    return dict(zip(eligible, scores, strict=False)), [keys[name] for name in scored]


def _normalised(group, cells, six, better):
    values = {key: [_value(group, cells[key][v], v) for v in group.variants] for key in six}
    table = {key: ranking.normalise(values[key], better[key]) for key in six}
    return {variant: {key: table[key][i] for key in six} for i, variant in enumerate(group.variants)}


def _value(group, cell, variant):
    """A variant's mean, or None if it may not be compared with the baseline's."""
    refused = cell["reason"] and group.baseline is not None and variant != group.baseline
    return None if refused else cell["mean"]


def _pareto(group, shown):
    """`{"x|y": {variant: probability of being non-dominated}}`; null where one block cannot tell."""
    ranked = {column.key: group.ranked(column.key) for column in shown}
    probabilities, drawn = {}, {}

    def draws(key, variants):
        at = (key, variants)
        if at not in drawn:
            drawn[at] = statistics.draws(group.logs(key, variants), _PARETO_DRAWS)
        return drawn[at]

    for x, y in itertools.combinations(shown, 2):
        shared = tuple(variant for variant in ranked[x.key] if variant in ranked[y.key])
        if len(shared) < 2 or len(shared) > ranking.MANY:
            continue
        if group.is_sure(x.key, shared) and group.is_sure(y.key, shared):
            shares = ranking.non_dominated_shares(draws(x.key, shared), draws(y.key, shared), x.better, y.better)
            probabilities[f"{x.key}|{y.key}"] = dict(zip(shared, np.round(shares, 3).tolist(), strict=True))
        else:
            probabilities[f"{x.key}|{y.key}"] = dict.fromkeys(shared)
    return probabilities


def _noise(group, key):
    noise = group.noise(key)
    return noise and {
        "ratio": noise.interval.ratio,
        "low": noise.interval.low,
        "high": noise.interval.high,
        "pairs": noise.interval.blocks,
        "spread": float(noise.spread),
        "smallest_effect": noise.smallest,
        "blocks_for_3_percent": noise.blocks_for_3,
    }
