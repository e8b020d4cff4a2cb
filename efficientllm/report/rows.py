"""Rows of runs: reading and checking record.json, and the configs of two rows beside each other."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import typing
from collections.abc import Iterable

from efficientllm.config.plain import flatten
from efficientllm.errors import UserError
from efficientllm.record import timing_notes
from efficientllm.record.row import read_record
from efficientllm.report import file_excerpts, row_types
from efficientllm.report.variant_names import compared_config, name_variants

GROUPS = ("paper", "physical", "quality", "conditions")
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
    def reads(self) -> str:
        """What the model learns from: "text", or "images" where its `embed` makes tokens of pictures.

        A row of inference names the objective of a diffusion model, whose `embed` is in its checkpoint.
        """
        samples_pictures = "objective" in (self.record.get("provenance") or {})
        return "text" if self.spec("model.embed") in (None, "tokens") and not samples_pictures else "images"

    @property
    def objective(self) -> str | None:
        """The spec of what the model was trained by; of a checkpoint's, where the config says `pretrained`."""
        return self.record["provenance"].get("objective") or self.config.get("objective")

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
        return timing_notes.notes(self.record)

    def fits(self, text: str) -> bool:
        """True if `text` is the row's name, or `key=value,...` of its config, such as `model.mixer=gqa`."""
        if text == self.record.get("name"):
            return True
        pairs = [pair.strip().partition("=") for pair in re.findall(r"(?:[^,(]|\([^)]*\)?)+", text)]
        return all(sign and str(self.config.get(key)) == value for key, sign, value in pairs)

    def spec(self, key: str) -> str | None:
        """The name in a spec string of the config."""
        return spec_name(self.config.get(key))

    def tail(self) -> str:
        """The last lines of a run's log, or an empty string."""
        text = self.record.get("log_tail") or self.record.get("error")
        if text:
            return text if isinstance(text, str) else "\n".join(map(str, text if isinstance(text, list) else [text]))
        return "\n".join(file_excerpts.read_end(self.path.with_name("log.txt")).splitlines()[-_TAIL:])


def spec_name(spec: object) -> str | None:
    """The name in a spec string: `moe` of `moe(num_experts=8)`; None where there is none."""
    match = re.match(r"\s*([\w.+-]+)", str(spec or ""))
    return match[1] if match else None


def read_rows(paths: Iterable[str | os.PathLike[str]]) -> list[Row]:
    """Reads rows, with variants and blocks. Raises UserError for a file that is no row."""
    return name_variants([read_row(path) for path in paths])


def read_row(file: str | os.PathLike[str]) -> Row:
    """Reads one row, without variant and block. Raises UserError for a file that is no row."""
    return make_row(read_record(file), pathlib.Path(file), file)


def make_row(record: dict[str, typing.Any], path: pathlib.Path, where: str | os.PathLike[str]) -> Row:
    """Checks a record and makes its row, without variant and block. Raises UserError that begins with `where`."""
    row_types.check_types(record, where)
    values, reasons = {}, {}
    for key, value in ((key, value) for group in GROUPS for key, value in _numbers(record, group)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{where}: no row: {key} is {value!r:.40}, not a number or null")
        finite = value is not None and math.isfinite(value)
        values[key] = float(value) if finite else None
        if not finite:
            reason = record["sources"].get(key, {}).get("reason")
            reasons[key] = reason or ("not recorded" if value is None else f"recorded as {value}")
    config = flatten(record["config"])
    if choice := record["provenance"].get("precision"):  # what "auto" was on the row's machine
        config["model.precision"] = choice.get("chosen")
    return Row(path, record, values, reasons, config, _identity(config))


def _numbers(record, group):
    """The metrics of a group; rows of older versions have no `conditions`."""
    recorded = record.get(group) or {}
    return [
        (key, value) for key, value in recorded.items() if group != "conditions" or key not in ("starved", "reasons")
    ]


def differing(a: Row, b: Row) -> list[str]:
    """The compared keys whose values differ between the configs of two rows."""
    config_a, config_b = compared_config(a.config), compared_config(b.config)
    return [key for key in sorted(config_a.keys() | config_b.keys()) if config_a.get(key) != config_b.get(key)]


def changes(a: Row, b: Row) -> list[str]:
    """`model.mixer gqa -> mla` for each differing key."""
    return [f"{key} {a.config.get(key)} -> {b.config.get(key)}" for key in differing(a, b)]


def _identity(config):
    text = json.dumps(compared_config(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
