"""The search: which techniques keep the limits, which of them is best, and why the others fell out."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from efficientllm.config.plain import flatten
from efficientllm.errors import UserError
from efficientllm.plan import estimate as estimates
from efficientllm.recommend.costs import Candidate, planned_keys
from efficientllm.recommend.evidence import Evidence, Figure
from efficientllm.recommend.request import Request
from efficientllm.recommend.techniques import Identity, Technique
from efficientllm.report import columns
from efficientllm.report.columns import format_value
from efficientllm.report.query import Condition

MEMORY = ("peak_memory_bytes", "amu_gb")
TIMES = ("al_s", "tokens_per_s", "usd_per_mtoken", "usd_per_run", "tt_tokens_per_param_s", "st_samples_per_param_s")
_BESIDE = ("peak_memory_bytes", "al_s", "ttft_s", "tpot_s")
DEFAULT_GOALS = {"pretrain": "al_s", "tune": "al_s", "infer": "tpot_s"}
# Reasons for which techniques fall out, in the order in which they are checked.
NO_EVIDENCE, QUALITY, MEMORY_LIMIT, LIMIT, REFUSED, WORSE = range(6)


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """A technique that fell out: `kind` is one of the reasons above, `why` says it with figures."""

    technique: Technique
    kind: int
    why: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A technique that keeps the limits: its best setting, and what evidence says by metric.

    value:       ranking value in the goal's unit.
    is_measured: from evidence, not from a plan.
    """

    candidate: Candidate
    figures: dict[str, Figure]
    value: float
    is_measured: bool

    @property
    def technique(self) -> Technique:
        return self.candidate.technique


@dataclasses.dataclass
class Result:
    """What was found: entries, best first, the exclusions, and metrics that no evidence at all speaks of.

    compiled: bytes that finalists need by the compiler.
    beside:   measured values on this device, by metric, of the chosen technique.
    """

    entries: list[Entry]
    exclusions: list[Exclusion]
    missing: tuple[str, ...] = ()
    goal: str = ""
    most: bool = False
    parameters: float = 0.0
    compiled: dict[str, float] = dataclasses.field(default_factory=dict)
    beside: dict[str, Figure] = dataclasses.field(default_factory=dict)


class Search:
    """A search among `techniques` for a Request; `make_planner(batch)` makes the planner of its task."""

    def __init__(self, request: Request, techniques: Sequence[Technique], evidence: Evidence, make_planner: typing.Any):
        self.request, self.techniques, self.evidence = request, list(techniques), evidence
        self.make_planner = make_planner
        self.planner = make_planner({})
        self.goal = request.query.goal or DEFAULT_GOALS[request.task]
        self.most = request.query.most if request.query.goal else False
        self.exclusions: list[Exclusion] = []

    def run(self) -> Result:
        """Searches -> Result."""
        parameters = self.planner.parameters
        asked = dict.fromkeys((*self.request.query.keys, self.goal))
        measured = self._measured(asked, parameters)
        of_evidence = [key for key in asked if key not in planned_keys(self.request.task) or key in measured]
        figures = {
            technique: {
                key: figure
                for key in of_evidence
                if (figure := measured.get(key, {}).get(technique.identity) or self._figure(technique, key, parameters))
            }
            for technique in self.techniques
        }
        missing = tuple(
            key for key in of_evidence if not any(key in technique_figures for technique_figures in figures.values())
        )
        result = Result([], [], missing, self.goal, self.most, parameters)
        if not missing:
            candidates = [
                technique
                for technique in self.techniques
                if self._keeps_evidence(technique, figures[technique], of_evidence)
            ]
            result.entries = self._rank(candidates, figures, of_evidence)
        result.exclusions = self.exclusions
        if result.entries:
            result.beside = self._beside(result.entries[0], parameters)
        return result

    def _beside(self, entry, parameters):
        figures = {key: self.evidence.figure(entry.technique.identity, key, parameters) for key in _BESIDE}
        return {key: figure for key, figure in figures.items() if figure and key not in entry.figures}

    def _figure(self, technique, key, parameters):
        if key in planned_keys(self.request.task):
            return None
        return self.evidence.figure(technique.identity, key, parameters)

    def _measured(self, keys, parameters):
        """`{key: {identity: Figure}}` of planned metrics that two techniques were measured by on this device."""
        identities = [technique.identity for technique in self.techniques]
        figures: dict[str, dict[Identity, Figure]] = {}
        for key in keys:
            if key in planned_keys(self.request.task) and columns.is_timed(key):
                measured = self.evidence.measured(key, identities, parameters)
                if len(measured) > 1 and self._is_of_asked_batch(next(iter(measured.values()))):
                    figures[key] = measured
        if figures:
            first = next(iter(next(iter(figures.values())).values()))
            self.planner = self.make_planner(self.evidence.batch_of(first))
        return figures

    def _is_of_asked_batch(self, figure):
        """Whether what the user fixed is what was measured."""
        asked, batch = flatten(self.request.preset.to_dict()), self.evidence.batch_of(figure)
        return bool(batch) and all(asked[key] == batch[key] for key in batch.keys() & self.request.fixed)

    def _keeps_evidence(self, technique, figures, keys):
        """Whether evidence exists and keeps the limits; a technique that falls out is noted."""
        if lacking := [key for key in keys if key not in figures]:
            return self._fall(technique, NO_EVIDENCE, f"no evidence of {', '.join(lacking)}")
        for condition in self.request.query.conditions:
            if condition.key not in figures:
                continue
            figure = figures[condition.key]
            says = figure.says(condition)
            if says is None:
                why = f"{condition.key} was measured on another model, {figure.apart:.3g}x apart; write a change: +1 %"
                return self._fall(technique, NO_EVIDENCE, why)
            if not says:
                return self._fall(technique, QUALITY, f"{condition.key} {figure.text}")
        return True

    def _fall(self, technique, kind, why):
        self.exclusions.append(Exclusion(technique, kind, why))
        return False

    def _rank(self, techniques, figures, of_evidence):
        """Entries, best first.

        Plans techniques in the order of their lower bounds, and stops once no remaining bound can reach second place.
        """
        by_evidence = self.goal in of_evidence
        least = not by_evidence and self.goal in MEMORY
        bounded = not by_evidence and (least or self.goal in TIMES)
        if by_evidence:
            bounds = {t: (-1 if self.most else 1) * figures[t][self.goal].mean for t in techniques}
        else:
            bound = self.planner.least_memory if least else self.planner.least_seconds
            bounds = {technique: bound(technique) if bounded else 0.0 for technique in techniques}
        ordered = sorted(techniques, key=lambda technique: (bounds[technique], self._quality(figures[technique])))
        entries: list[Entry] = []
        for technique in ordered:
            if by_evidence and len(entries) > 1 and bounds[technique] > bounds[entries[1].technique]:
                self._fall(technique, WORSE, figures[technique][self.goal].text)
                continue
            if bounded and bounds[technique] and len(entries) > 1:
                second = _measure(sorted(entries, key=self._order)[1], least)
                if bounds[technique] > second:
                    self._fall(
                        technique, WORSE, f"at best {_show_bound(bounds[technique], least)}, not planned further"
                    )
                    continue
            entry = self._best_setting(technique, figures[technique], least)
            if entry:
                entries.append(entry)
        return sorted(entries, key=self._order)

    def _order(self, entry):
        """Best first; of equals the one that evidence prefers, then the one of less memory, then by name."""
        value = entry.value if not self.most else -entry.value
        memory = entry.candidate.metrics["peak_memory_bytes"]
        return float(f"{value:.6g}"), self._quality(entry.figures), memory, entry.technique.name

    def _quality(self, figures):
        ratios = [figure.ratio for key, figure in figures.items() if columns.column(key, "", None).better == "lower"]
        return ratios[0] if ratios else 1.0

    def _best_setting(self, technique, figures, least):
        """The Entry of the first setting that keeps the limits, or of the best where all must be looked at."""
        settings = [{}] if self.goal in figures and self.planner.batch else self.planner.settings(technique)
        best, why, needed = None, (REFUSED, "has no setting"), float("inf")
        for setting in settings[::-1] if least else settings:
            try:
                candidate = self.planner.plan(technique, setting)
            except UserError as error:
                why = REFUSED, str(error)
                continue
            if out := self._breaks(candidate, figures):
                memory = candidate.metrics["peak_memory_bytes"]
                why, needed = (out, memory) if out[0] != MEMORY_LIMIT or memory < needed else (why, needed)
                if least and out[0] == MEMORY_LIMIT:
                    break  # the other settings need more
                continue
            entry = self._entry(candidate, figures)
            if entry is None:
                why = LIMIT, f"no {self.goal} is planned"
                continue
            if best is None or self._order(entry) < self._order(best):
                best = entry
            if self.request.task != "infer" and (entry.is_measured or self.goal in (*MEMORY, *TIMES)):
                break  # the others are slower, or need more
        if best is None:
            self._fall(technique, *why)
        return best

    def _entry(self, candidate, figures):
        if self.goal in figures:
            return Entry(candidate, figures, figures[self.goal].mean, True)
        value = candidate.metrics.get(self.goal)
        return None if value is None else Entry(candidate, figures, value, False)

    def _breaks(self, candidate, figures):
        """`(kind, why)` of the first limit on planned metrics that a candidate does not keep, or None."""
        memory, room = candidate.metrics["peak_memory_bytes"], self.request.memory_bytes
        if memory > room:
            return MEMORY_LIMIT, f"needs {format_value(memory, 'bytes')} of {format_value(room, 'bytes')}"
        for condition in self.request.query.conditions:
            if condition.key not in figures and (why := _check_planned(condition, candidate)):
                return LIMIT, why
        return None

    def check_finalists(self, result: Result) -> None:
        """Compiles choice and runner-up, if the hardware's compiler is here; those that do not fit fall out."""
        if not self.request.hardware.has_compiler:
            return
        place = 0
        while place < min(2, len(result.entries)):
            entry = result.entries[place]
            size = estimates.total_bytes(self.planner.workload(entry.candidate), self.request.hardware)
            if size is None or size <= self.request.memory_bytes:
                result.compiled[entry.technique.name] = size
                place += 1
                continue
            room = format_value(self.request.memory_bytes, "bytes")
            why = f"by the compiler {format_value(size, 'bytes')} of {room}"
            result.exclusions.append(Exclusion(entry.technique, MEMORY_LIMIT, why))
            del result.entries[place]


def check_query(request: Request) -> None:
    """Raises UserError for a relative limit on a metric that is planned."""
    for condition in request.query.conditions:
        if condition.relative is not None and condition.key in planned_keys(request.task):
            raise UserError(
                f"--limits: {condition.text!r}: {condition.key} is planned, and has no baseline; write a value"
            )


def _check_planned(condition: Condition, candidate: Candidate) -> str | None:
    value = candidate.metrics.get(condition.key)
    if value is None:
        return f"{condition.key} is not planned"
    unit = columns_of()[condition.key].unit
    return None if condition.holds(value) else f"{condition.key} is {format_value(value, unit)}"


def columns_of() -> dict[str, columns.Column]:
    """The columns of every report, by key."""
    return {column.key: column for column in columns.list_columns([])}


def _measure(entry, least):
    return entry.candidate.metrics["peak_memory_bytes" if least else "al_s"]


def _show_bound(bound, least):
    return format_value(bound, "bytes" if least else "s")
