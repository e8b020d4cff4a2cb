"""Rows from files: checked, and told apart as replicates of variants."""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import textwrap

from efficientllm.config.plain import flatten
from efficientllm.errors import UserError
from efficientllm.record import notes
from efficientllm.record.row import read_record
from efficientllm.report import texts, valid

# Keys that say how a run is watched, saved or called, not what is compared.
IGNORED = ("name", "seed", "sweep", "imports", "memory_gb", "checkpoint", "sample", "metrics", "train.log_every")
GROUPS = ("paper", "physical", "quality", "conditions")
_LONGEST_LABEL, _LONGEST_VALUE = 60, 40  # characters
_TELLING = ("model.", "adapter", "quant", "infer.", "train.", "data", "tokenizer")
_TAIL = 12


@dataclasses.dataclass
class Row:
    """One run. `values` holds every metric as a finite number or None; `reasons` says why for each None.

    `variant` names what replicates share; `block` is the round of a sweep (or the seed) that pairs it with others.
    """

    path: pathlib.Path
    record: dict
    values: dict
    reasons: dict
    config: dict
    identity: str
    variant: str = ""
    baseline: str | None = None
    block: str = ""
    order: int = 0

    @property
    def outcome(self):
        return self.record["outcome"]

    @property
    def ok(self):
        return self.outcome == "ok"

    @property
    def predicted(self):
        return self.task == "plan"

    @property
    def task(self):
        return self.record["task"]

    @property
    def kind(self):
        """The task that was run, or planned."""
        return self.config.get("plan.of", "pretrain") if self.predicted else self.task

    @property
    def sweep(self):
        return self.record.get("sweep") or {}

    @property
    def started(self):
        return self.record["provenance"].get("started") or ""

    def unit(self, key):
        return self.record["sources"].get(key, {}).get("unit") or "1"

    def source(self, key):
        return self.record["sources"].get(key, {}).get("source") or ""

    def group(self, key):
        return next(group for group in GROUPS if key in (self.record.get(group) or {}))

    @property
    def starved(self):
        """True, False, or None where the row does not say."""
        return (self.record.get("conditions") or {}).get("starved")

    @property
    def starved_by(self):
        """Why it is, in words."""
        return "; ".join((self.record.get("conditions") or {}).get("reasons") or ())

    def notes(self):
        """What a reader of its times must know."""
        return notes.notes(self.record)

    def fits(self, text):
        """Whether the config has these values, `model.mixer=gqa` or several with commas between them, or this name."""
        if text == self.record.get("name"):
            return True
        pairs = [part.strip().partition("=") for part in re.findall(r"(?:[^,(]|\([^)]*\)?)+", text)]
        return all(sign and str(self.config.get(key)) == value for key, sign, value in pairs)

    def spec(self, key):
        """The name of a spec string of the config, without its fields: `moe` of `moe(num_experts=8)`."""
        found = re.match(r"\s*([\w.+-]+)", str(self.config.get(key) or ""))
        return found[1] if found else None

    def tail(self):
        """The last lines of a failed run's log, or an empty string."""
        kept = self.record.get("log_tail") or self.record.get("error")
        if kept:
            return kept if isinstance(kept, str) else "\n".join(map(str, kept if isinstance(kept, list) else [kept]))
        return "\n".join(texts.end(self.path.with_name("log.txt")).splitlines()[-_TAIL:])


def read(paths):
    """The rows of these files, with variants and blocks. Raises UserError for a file that is no row."""
    return told_apart([read_row(path) for path in paths])


def told_apart(rows):
    """The same rows, with variants and blocks: of this set, as names are what rows differ in."""
    _name_variants(rows)
    _number_blocks(rows)
    return rows


def read_row(file):
    """One row, not yet told apart from others. Raises UserError for a file that is no row."""
    record = read_record(file)
    valid.check(record, file)
    values, reasons = {}, {}
    for key, value in ((key, value) for group in GROUPS for key, value in _numbers(record, group)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{file}: no row: {key} is {value!r:.40}, not a number or null")
        finite = value is not None and math.isfinite(value)
        values[key] = float(value) if finite else None
        if not finite:
            said = record["sources"].get(key, {}).get("reason")
            reasons[key] = said or ("not recorded" if value is None else f"recorded as {value}")
    config = flatten(record["config"])
    return Row(pathlib.Path(file), record, values, reasons, config, _identity(config))


def _numbers(record, group):
    """The metrics of a group; rows of older versions have no conditions."""
    found = record.get(group) or {}
    return [(key, value) for key, value in found.items() if group != "conditions" or key not in ("starved", "reasons")]


def _compared(config):
    ignored = IGNORED if config.get("task") == "plan" else (*IGNORED, "plan")
    return {k: v for k, v in config.items() if not any(k == i or k.startswith(f"{i}.") for i in ignored)}


def differing(a, b):
    """The keys, of those that are compared, whose values differ between the configs of two rows."""
    ours, theirs = _compared(a.config), _compared(b.config)
    return [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]


def changes(a, b):
    """`model.mixer gqa -> mla` for each of them."""
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
    """Two configs under one name, as a sweep run at two sizes leaves them, get the size, or the config's hash."""
    configs = collections.defaultdict(dict)
    for row in rows:
        configs[row.sweep.get("name"), row.variant].setdefault(row.identity, str(row.config.get("model.size")))
    clashes = {name for (name, _), found in configs.items() if len(found) > 1}
    for row in rows:
        name, found = row.sweep.get("name"), configs[row.sweep.get("name"), row.variant]
        sized = len(set(found.values())) == len(found)
        if name in clashes and sized:
            size = row.config.get("model.size")
            row.variant, row.baseline = f"{row.variant} ({size})", row.baseline and f"{row.baseline} ({size})"
        elif len(found) > 1:
            row.variant = f"{row.variant} #{row.identity[:4]}"


def _labels(rows):
    """`{identity: label}`, told apart among the rows of a task, which share a table."""
    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    return {identity: label for own in kinds.values() for identity, label in _labels_of(own).items()}


def _labels_of(rows):
    """The keys in which the configs differ; where that is too long the configs' names, and of configs under one name
    the few keys that tell them apart."""
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
        own = {identity: config for identity, config in configs.items() if names[identity] == name}
        keys = _telling(own)
        labels |= {
            each: f"{name} ({_listed(config, keys, _LONGEST_VALUE)})" if keys else name for each, config in own.items()
        }
    return labels


def _different(configs):
    configs = list(configs)
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def _telling(configs):
    """Few keys whose values are another in each of the configs: those of the model before those of training."""
    order = lambda key: next((i for i, part in enumerate(_TELLING) if key.startswith(part)), len(_TELLING))  # noqa: E731
    chosen, seen = [], 1
    for key in sorted(_different(configs.values()), key=order):
        values = {json.dumps([config.get(each) for each in (*chosen, key)]) for config in configs.values()}
        if len(values) > seen:
            chosen, seen = [*chosen, key], len(values)
    return chosen


def _listed(config, keys, longest=None):
    shown = {key: str(config[key]) for key in keys if key in config}
    return ", ".join(
        f"{key}={textwrap.shorten(v, longest, placeholder='...') if longest else v}" for key, v in shown.items()
    )


def _number_blocks(rows):
    """The sweep's block, else the seed; a second row of a variant with the same seed is a block of its own."""
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
    """`{path: number}` of rows of sweeps that ran more than once under one name: their folders, in order of start.

    A sweep holds a place of a block once; where two rows claim it, folders tell which of them ran together.
    """
    places = collections.defaultdict(list)
    for row in rows:
        if "block" in row.sweep:
            key = (row.sweep.get("name"), row.sweep["block"], row.sweep.get("order"), row.sweep.get("variant"))
            places[key].append(row)
    names = {key[0] for key, found in places.items() if len({row.path.parent.parent for row in found}) > 1}
    folders = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.started, str(row.path))):
        if row.sweep.get("name") in names and row.path.parent.parent not in folders[row.sweep["name"]]:
            folders[row.sweep["name"]].append(row.path.parent.parent)
    ours = [row for row in rows if row.sweep.get("name") in names]
    return {row.path: 1 + folders[row.sweep["name"]].index(row.path.parent.parent) for row in ours}
