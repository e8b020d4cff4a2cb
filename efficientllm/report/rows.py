"""Rows of runs: reading and checking record.json, naming variants, numbering blocks."""

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import textwrap
import typing
from collections.abc import Iterable

from efficientllm.config.plain import flatten
from efficientllm.errors import UserError
from efficientllm.record import notes
from efficientllm.record.row import read_record
from efficientllm.report import file_excerpts, row_types

# Keys that say how a run is logged, saved or named; a difference in them is no difference of technique.
IGNORED = ("name", "seed", "sweep", "imports", "memory_gb", "checkpoint", "sample", "metrics", "train.log_every")
GROUPS = ("paper", "physical", "quality", "conditions")
_LONGEST_LABEL, _LONGEST_VALUE = 60, 40  # characters
_TELLING = ("model.", "adapter", "quant", "infer.", "train.", "data", "tokenizer")
_TAIL = 12


@dataclasses.dataclass
class Row:
    """One run.

    values:   every metric, a finite number or None; `reasons` has the reason for each None.
    identity: hash of the compared part of the config.
    variant:  the name that replicates share.
    block:    the round of a sweep (or the seed) that pairs this row with others.
    """

    path: pathlib.Path
    record: dict[str, typing.Any]
    values: dict[str, float | None]
    reasons: dict[str, str]
    config: dict[str, typing.Any]
    identity: str
    variant: str = ""
    baseline: str | None = None
    block: str = ""
    order: int = 0

    @property
    def outcome(self) -> str:
        return self.record["outcome"]

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def predicted(self) -> bool:
        return self.task == "plan"

    @property
    def task(self) -> str:
        return self.record["task"]

    @property
    def kind(self) -> str:
        """The task that was run; for a plan, the planned task."""
        return self.config.get("plan.of", "pretrain") if self.predicted else self.task

    @property
    def sweep(self) -> dict[str, typing.Any]:
        return self.record.get("sweep") or {}

    @property
    def started(self) -> str:
        return self.record["provenance"].get("started") or ""

    def unit(self, key: str) -> str:
        return self.record["sources"].get(key, {}).get("unit") or "1"

    def source(self, key: str) -> str:
        return self.record["sources"].get(key, {}).get("source") or ""

    def group(self, key: str) -> str:
        return next(group for group in GROUPS if key in (self.record.get(group) or {}))

    @property
    def starved(self) -> bool | None:
        """Whether other programs took CPU time during the measurement; None where the row does not say."""
        return (self.record.get("conditions") or {}).get("starved")

    @property
    def starved_by(self) -> str:
        """The reasons why the row is starved."""
        return "; ".join((self.record.get("conditions") or {}).get("reasons") or ())

    def notes(self) -> list[str]:
        """Notes that a reader of its times must know."""
        return notes.notes(self.record)

    def fits(self, text: str) -> bool:
        """True if `text` is the row's name, or `key=value,...` of its config, such as `model.mixer=gqa`."""
        if text == self.record.get("name"):
            return True
        pairs = [pair.strip().partition("=") for pair in re.findall(r"(?:[^,(]|\([^)]*\)?)+", text)]
        return all(sign and str(self.config.get(key)) == value for key, sign, value in pairs)

    def spec(self, key: str) -> str | None:
        """The name in a spec string of the config: `moe` of `moe(num_experts=8)`."""
        match = re.match(r"\s*([\w.+-]+)", str(self.config.get(key) or ""))
        return match[1] if match else None

    def tail(self) -> str:
        """The last lines of a run's log, or an empty string."""
        text = self.record.get("log_tail") or self.record.get("error")
        if text:
            return text if isinstance(text, str) else "\n".join(map(str, text if isinstance(text, list) else [text]))
        return "\n".join(file_excerpts.read_end(self.path.with_name("log.txt")).splitlines()[-_TAIL:])


def read_rows(paths: Iterable[str | os.PathLike[str]]) -> list[Row]:
    """Reads rows, with variants and blocks. Raises UserError for a file that is no row."""
    return name_variants([read_row(path) for path in paths])


def name_variants(rows: list[Row]) -> list[Row]:
    """Sets the variants and blocks of these rows; names depend on what the rows of this set differ in."""
    _name_variants(rows)
    _number_blocks(rows)
    return rows


def read_row(file: str | os.PathLike[str]) -> Row:
    """Reads one row, without variant and block. Raises UserError for a file that is no row."""
    record = read_record(file)
    row_types.check_types(record, file)
    values, reasons = {}, {}
    for key, value in ((key, value) for group in GROUPS for key, value in _numbers(record, group)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{file}: no row: {key} is {value!r:.40}, not a number or null")
        finite = value is not None and math.isfinite(value)
        values[key] = float(value) if finite else None
        if not finite:
            reason = record["sources"].get(key, {}).get("reason")
            reasons[key] = reason or ("not recorded" if value is None else f"recorded as {value}")
    config = flatten(record["config"])
    return Row(pathlib.Path(file), record, values, reasons, config, _identity(config))


def _numbers(record, group):
    """The metrics of a group; rows of older versions have no `conditions`."""
    recorded = record.get(group) or {}
    return [
        (key, value) for key, value in recorded.items() if group != "conditions" or key not in ("starved", "reasons")
    ]


def _compared(config):
    ignored = IGNORED if config.get("task") == "plan" else (*IGNORED, "plan")
    return {k: v for k, v in config.items() if not any(k == i or k.startswith(f"{i}.") for i in ignored)}


def differing(a: Row, b: Row) -> list[str]:
    """The compared keys whose values differ between the configs of two rows."""
    config_a, config_b = _compared(a.config), _compared(b.config)
    return [key for key in sorted(config_a.keys() | config_b.keys()) if config_a.get(key) != config_b.get(key)]


def changes(a: Row, b: Row) -> list[str]:
    """`model.mixer gqa -> mla` for each differing key."""
    return [f"{key} {a.config.get(key)} -> {b.config.get(key)}" for key in differing(a, b)]


def _identity(config):
    text = json.dumps(_compared(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    configs = {row.identity: _compared(row.config) for row in rows}
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
