"""Quality sweeps and cost sweeps of the same variants, joined into one ranking.

A quality sweep trains long beside other work: it supplies held-out losses, and no time. A cost sweep runs a few steps
on a machine at rest: it supplies times, energy and memory, and no quality. Two of them are joined where a variant of
one name has one config in both, but for the keys that say how long it runs. Each metric keeps the rows, blocks and
count of the sweep that supplies it; `describe_parts` says the steps and tokens of both.
"""

import collections
import json
import typing
from collections.abc import Iterable, Sequence

from efficientllm.report import columns
from efficientllm.report.rows import Row
from efficientllm.report.variant_names import compared_config

QUALITY, COST = "quality", "cost"
ANY_DEVICE = "any device"  # in the key of a quality sweep: losses are not those of a machine
# Of the weights, whatever is run with them. The quality sweep has more variants: a method of rounding changes no cost.
OF_WEIGHTS = ("params_", "resident_weight_bytes")
Key = tuple[str, str, str, str]  # of a group: sweep, task, device, batch
# Keys in which the two runs of a variant may differ: the length of training and evaluation, and the measured requests.
LENGTH = (
    "train.steps",
    "train.schedule",
    "train.rates",
    "eval",
    "quality",
    "infer.batch_size",
    "infer.prompt_length",
    "infer.max_new_tokens",
    "infer.prompts",
    "infer.repeats",
    "infer.baseline",
)


def measures(row: Row) -> str | None:
    """What the sweep of a row measures: QUALITY, COST, or None for both."""
    kind = row.sweep.get("measures")
    return kind if kind in (QUALITY, COST) else None


def measured_parts(rows: Iterable[Row]) -> set[str]:
    """The kinds of sweeps among the rows of a group."""
    return {kind for row in rows if (kind := measures(row))}


def supplies(row: Row, key: str, parts: set[str]) -> bool:
    """Whether a row may supply a metric in a group with these `measured_parts`."""
    kind = measures(row)
    if key.startswith(OF_WEIGHTS) and QUALITY in parts:
        return kind == QUALITY
    if kind == QUALITY:
        return _is_quality(row, key) or (COST not in parts and not _is_of_machine(key))
    return kind != COST or not _is_quality(row, key)


def _is_quality(row, key):
    return columns.is_quality(key) or key == "mcr" or key in (row.record.get("quality") or {})


def _is_of_machine(key):
    return columns.is_timed(key) or columns.is_condition(key)


def why_not(rows: Sequence[Row], key: str) -> str:
    """Why none of a variant's rows supplies a metric."""
    kinds = measured_parts(rows)
    if kinds == {COST} and any(_is_quality(row, key) for row in rows):
        return "of a cost sweep, whose few steps say nothing of quality"
    if _is_of_machine(key):
        return "of a quality sweep, which ran beside other work: no time of it counts"
    return "its cost sweep has no row of it"


def join_sweeps(rows_by_key: dict[Key, list[Row]]) -> dict[Key, list[Row]]:
    """Replaces the groups of a quality sweep and of a cost sweep of the same variants by one; others stay."""
    kinds = {key: measured_parts(rows) for key, rows in rows_by_key.items()}
    joined, consumed = {}, set()
    for quality in (key for key, parts in kinds.items() if parts == {QUALITY}):
        for cost in (key for key, parts in kinds.items() if parts == {COST}):
            if same := _same_variants(quality, cost, rows_by_key):
                rows = [row for row in rows_by_key[cost] if row.variant in same]
                name = f"{quality[0]} + {cost[0]}"
                joined[name, cost[1], cost[2], cost[3]] = rows_by_key[quality] + rows
                consumed |= {quality, cost}
    return {key: rows for key, rows in rows_by_key.items() if key not in consumed} | joined


def _same_variants(quality, cost, rows_by_key):
    """The variants that both groups hold with one config; empty if the baseline is not among them."""
    if quality[1] != cost[1] or (quality[1] != "infer" and quality[3] != cost[3]):
        return set()
    configs = [_configs(rows_by_key[key]) for key in (quality, cost)]
    same = {variant for variant in configs[0] if configs[0][variant] == configs[1].get(variant)}
    baselines = {row.baseline for key in (quality, cost) for row in rows_by_key[key]}
    return same if len(baselines) == 1 and baselines <= same else set()


def _configs(rows):
    """`{variant: its configs without LENGTH}`, of runs that ended well."""
    configs = collections.defaultdict(set)
    for row in rows:
        if row.ok:
            compared = compared_config(row.config)
            kept = {key: value for key, value in compared.items() if not is_length(key)}
            configs[row.variant].add(json.dumps(kept, sort_keys=True))
    return configs


def is_length(key: str) -> bool:
    """Whether a key of a config says how long a run trains, evaluates or serves, and not what is run."""
    return any(key == length or key.startswith(f"{length}.") for length in LENGTH)


def describe_parts(rows: Sequence[Row]) -> dict[str, dict[str, typing.Any]]:
    """`{quality: {sweep, steps, tokens, rows, blocks}, cost: ...}` of a group; empty without such sweeps."""
    parts = {}
    for kind in (QUALITY, COST):
        of_kind = [row for row in rows if row.ok and measures(row) == kind]
        if of_kind:
            parts[kind] = {
                "sweep": of_kind[0].sweep.get("name"),
                "steps": _common(row.config.get("train.steps") for row in of_kind),
                "tokens": _common(map(_tokens, of_kind)),
                "rows": len(of_kind),
                "blocks": len({row.block for row in of_kind}),
            }
    return parts


def _tokens(row):
    shape = [row.config.get(f"train.{key}") for key in ("steps", "batch_size", "length")]
    if row.kind == "infer" or not all(isinstance(size, int) for size in shape):
        return None
    steps, rows, length = shape
    return steps * rows * length


def _common(values):
    """The value that all have, else None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def format_parts(parts: dict[str, dict[str, typing.Any]]) -> str:
    """Formats `describe_parts` as a sentence for each sweep."""
    what = {QUALITY: "Quality", COST: "Times, energy and memory"}
    sentences = []
    for kind, part in parts.items():
        length = "" if part["steps"] is None else f", {part['steps']:,} steps"
        length += "" if part["tokens"] is None else f" ({part['tokens']:,} tokens)"
        sentences.append(
            f"{what[kind]}: sweep {part['sweep']}{length}, {part['rows']} rows in {part['blocks']} blocks."
        )
    return " ".join(sentences)
