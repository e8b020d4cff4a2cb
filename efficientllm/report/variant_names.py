"""Names of variants and blocks: how the rows of one set are told apart."""

from __future__ import annotations

import collections
import json
import textwrap
import typing

if typing.TYPE_CHECKING:
    from efficientllm.report.rows import Row

# Keys that say how a run is logged, saved or named; a difference in them is no difference of technique.
IGNORED = (
    "name",
    "seed",
    "sweep",
    "imports",
    "memory_gb",
    "checkpoint",
    "sample",
    "quality.fd",
    "metrics",
    "train.log_every",
)
_LONGEST_LABEL, _LONGEST_VALUE = 60, 40  # characters
_TELLING = ("model.", "adapter", "quant", "infer.", "train.", "data", "tokenizer")


def name_variants(rows: list[Row]) -> list[Row]:
    """Sets the variants and blocks of these rows; names depend on what the rows of this set differ in."""
    _name_variants(rows)
    _number_blocks(rows)
    return rows


def compared_config(config: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The keys of a config by which runs are compared."""
    ignored = IGNORED if config.get("task") == "plan" else (*IGNORED, "plan")
    return {k: v for k, v in config.items() if not any(k == i or k.startswith(f"{i}.") for i in ignored)}


def _name_variants(rows):
    labels = _labels([row for row in rows if not row.sweep.get("variant")])
    for row in rows:
        row.variant = row.sweep.get("variant") or labels[row.identity]
        row.baseline = row.sweep.get("baseline")
    _tell_apart(rows)


def _tell_apart(rows):
    """Adds the size, or the config's hash, to variants that share a name, such as those of a sweep at two sizes."""
    configs = collections.defaultdict(dict)
    for row in rows:
        configs[row.sweep.get("name"), row.variant].setdefault(row.identity, str(row.config.get("model.size")))
    clashes = {name for (name, _), sizes in configs.items() if len(sizes) > 1}
    for row in rows:
        name, sizes = row.sweep.get("name"), configs[row.sweep.get("name"), row.variant]
        sized = len(set(sizes.values())) == len(sizes)
        if name in clashes and sized:
            size = row.config.get("model.size")
            row.variant, row.baseline = f"{row.variant} ({size})", row.baseline and f"{row.baseline} ({size})"
        elif len(sizes) > 1:
            row.variant = f"{row.variant} #{row.identity[:4]}"


def _labels(rows):
    """`{identity: label}`, distinct among the rows of a task, which share a table."""
    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    return {identity: label for rows_of_kind in kinds.values() for identity, label in _labels_of(rows_of_kind).items()}


def _labels_of(rows):
    """Labels from the keys in which the configs differ; if too long, the configs' names with the few keys that
    distinguish configs of one name."""
    configs = {row.identity: compared_config(row.config) for row in rows}
    names = {row.identity: row.record.get("name") or row.identity for row in rows}
    differ = _different(configs.values())
    if not differ:
        return names
    full = {identity: _listed(config, differ) for identity, config in configs.items()}
    if max(map(len, full.values())) <= _LONGEST_LABEL:
        return full
    labels = {}
    for name in dict.fromkeys(names.values()):
        same_name = {identity: config for identity, config in configs.items() if names[identity] == name}
        keys = _telling(same_name)
        labels |= {
            identity: f"{name} ({_listed(config, keys, _LONGEST_VALUE)})" if keys else name
            for identity, config in same_name.items()
        }
    return labels


def _different(configs):
    configs = list(configs)
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def _telling(configs):
    """A few keys whose values together distinguish the configs; keys of the model before keys of training."""

    def priority(key):
        return next((i for i, prefix in enumerate(_TELLING) if key.startswith(prefix)), len(_TELLING))

    chosen, seen = [], 1
    for key in sorted(_different(configs.values()), key=priority):
        values = {json.dumps([config.get(chosen_key) for chosen_key in (*chosen, key)]) for config in configs.values()}
        if len(values) > seen:
            chosen, seen = [*chosen, key], len(values)
    return chosen


def _listed(config, keys, longest=None):
    shown = {key: str(config[key]) for key in keys if key in config}
    return ", ".join(
        f"{key}={textwrap.shorten(v, longest, placeholder='...') if longest else v}" for key, v in shown.items()
    )


def _number_blocks(rows):
    """Sets the block: the sweep's, else the seed; a second row of a variant with the same seed is another block."""
    seen, again = collections.Counter(), _repeated(rows)
    for row in sorted(rows, key=lambda row: (row.started, str(row.path))):
        name = row.sweep.get("name")
        if "block" in row.sweep:
            row.block, row.order = str(row.sweep["block"]), row.sweep.get("order") or 0
        else:
            seed = row.config.get("seed", row.record["provenance"].get("seed"))
            repeat = seen[row.identity, seed]
            seen[row.identity, seed] += 1
            row.block, row.order = f"seed {seed}" + (f", repeat {repeat + 1}" if repeat else ""), repeat
        if name:
            place = again.get(row.path)
            row.block = f"{name} {row.block}" + (f", sweep {place}" if place else "")


def _repeated(rows):
    """`{path: number}` for rows of sweeps that ran more than once under one name: the number of their folder, by start.

    A sweep has one row for each block, order and variant. If two rows claim it, their folders tell the sweeps apart.
    """
    places = collections.defaultdict(list)
    for row in rows:
        if "block" in row.sweep:
            key = (row.sweep.get("name"), row.sweep["block"], row.sweep.get("order"), row.sweep.get("variant"))
            places[key].append(row)
    names = {key[0] for key, claimants in places.items() if len({row.path.parent.parent for row in claimants}) > 1}
    folders = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.started, str(row.path))):
        if row.sweep.get("name") in names and row.path.parent.parent not in folders[row.sweep["name"]]:
            folders[row.sweep["name"]].append(row.path.parent.parent)
    repeated_rows = [row for row in rows if row.sweep.get("name") in names]
    return {row.path: 1 + folders[row.sweep["name"]].index(row.path.parent.parent) for row in repeated_rows}
