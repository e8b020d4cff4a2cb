"""Regression check: whether B is worse than A, metric by metric, with 95 % intervals paired by shared blocks.

All rows of both sides must have the same setting; a difference is an error that names it. Nulls are reported and left
out, copies of a run count once. The technique (mixer, ffn, adapter, quant, ...) may differ: it is what is compared.
"""

import dataclasses
import math
from collections.abc import Sequence

from efficientllm.errors import UserError, did_you_mean
from efficientllm.report import columns, comparability, find_rows, rows, statistics
from efficientllm.report.rows import Row

DEFAULT = (
    "al_s",
    "tokens_per_s",
    "tpot_s",
    "j_per_token",
    "amu_gb",
    "peak_memory_bytes",
    "flops_per_token",
    "eval_loss",
)
STARVED = "not compared: starved"
OK, REGRESSED, UNDECIDED = 0, 1, 3  # exit statuses; 2 is a UserError's
# A difference in precision is the technique under test if nothing else differs, and otherwise an error.
_PRECISION = ("model.precision", "infer.precision")


@dataclasses.dataclass(frozen=True)
class MetricComparison:
    """One metric of one variant: means of A and B, the interval of B/A, and the verdict."""

    variant: str
    column: columns.Column
    a: float
    b: float
    interval: statistics.Interval | None
    verdict: str

    @property
    def decided(self) -> bool:
        """False if the rows allow no verdict."""
        return self.interval is not None and self.interval.low is not None and self.verdict != statistics.WIDE


def compare_runs(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metrics: Sequence[str] = (), margin: float = statistics.MARGIN
) -> tuple[list[str], int]:
    """Compares the rows of A and B -> `(lines of a table with notes, status)`.

    REGRESSED: the 95 % interval of a metric lies on the worse side of equal; a difference within `margin` is equal.
    UNDECIDED: no metric regressed, but one has no verdict (one run a side, a starved machine, a wide interval).
    Raises UserError for rows that may not be compared.
    """
    table: list[MetricComparison] = []
    notes: list[str] = []
    matched = _match_variants(rows_a, rows_b, notes)
    for name, a, b in matched:
        keys = _metrics(a, b, metrics, name, notes)
        _check_setting(name, a, b, keys)
        table += [_line(name, key, a, b, margin, requested=bool(metrics), notes=notes) for key in keys]
    if not table:
        raise UserError("not comparable: A and B have no metric in common that could regress; name one with --metric=")
    for name, a, b in matched:
        _check_runs(name, a, b)
    regressed = any(line.verdict == "worse" for line in table)
    undecided = [line for line in table if not line.decided]
    status = REGRESSED if regressed else UNDECIDED if undecided else OK
    return [*_lines(table), *dict.fromkeys(notes), "", _conclusion(status, undecided)], status


def _conclusion(status, undecided):
    if status == REGRESSED:
        return "B regressed against A"
    if status == OK:
        return "no regression seen"
    keys = ", ".join(dict.fromkeys(line.column.key for line in undecided))
    remedy = "more runs of each (another config.seed) would give one"
    if any(line.verdict == STARVED for line in undecided):
        remedy = "run both again on a machine of their own, or as variants of one sweep"
    return f"undecided: no verdict on {keys}; {remedy}"


def _match_variants(rows_a, rows_b, notes):
    """`(name, rows of A, rows of B)` for each shared variant; a single variant a side needs no equal name."""
    sides = [{}, {}]
    for name, side, side_rows in zip("AB", sides, (rows_a, rows_b), strict=True):
        for row in side_rows:
            if row.ok and not row.predicted:
                side.setdefault(row.sweep.get("variant") or row.identity, []).append(row)
            else:
                outcome = "a plan" if row.predicted else f"outcome {row.outcome}"
                notes.append(f"{name}: {row.path} is left out: {outcome}")
        if not side:
            raise UserError(f"not comparable: {name} holds no measured run that ended well")
    a, b = sides
    if len(a) == len(b) == 1:
        return [(_name(*a.values(), *b.values()), *a.values(), *b.values())]
    shared = [variant for variant in a if variant in b]
    if not shared:
        raise UserError("not comparable: A and B share no variant, and hold more than one each")
    for name, side in zip("AB", sides, strict=True):
        alone = [_name(side_rows) for variant, side_rows in side.items() if variant not in shared]
        if alone:
            notes.append(f"{name} alone has {', '.join(sorted(set(alone)))}: not compared")
    return [(_name(a[variant]), a[variant], b[variant]) for variant in shared]


def _name(a, b=()):
    """The variant's name, or `A's -> B's` where the names differ."""
    names = [side[0].sweep.get("variant") or side[0].record.get("name") or side[0].identity for side in (a, b) if side]
    name = " -> ".join(dict.fromkeys(names))
    if b and names[0] == names[1] and (changes := rows.changes(a[0], b[0])):
        name += f" ({', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''})"
    return name


def _check_setting(name, a, b, keys):
    """Raises UserError if the setting of a row differs from that of A's first row."""
    first, timed = a[0], any(not columns.is_exact(key) for key in keys)
    for side, side_rows in (("A", a), ("B", b)):
        for row in side_rows:
            pairs = {
                "task": (first.task, row.task),
                "device": (comparability.device(first), comparability.device(row)),
                "effective batch": (comparability.batch(first), comparability.batch(row)),
                **_precision(first, row),
            }
            if timed:
                facts = comparability.training_facts(row, first, "" if "bits_per_byte" not in keys else "bits_per_byte")
                pairs |= {fact: (expected, value) for fact, (value, expected) in facts.items()}
            for fact, (expected, value) in pairs.items():
                if value != expected and None not in (value, expected):
                    raise UserError(
                        f"not comparable: the {fact} of {name} is {expected} in A ({first.path.parent}) and {value} "
                        f"in {side} ({row.path.parent})"
                    )


def _precision(a, b):
    if a.kind == "infer":
        return {}
    others = [key for key in rows.differing(a, b) if key.startswith(("model.", "adapter", "quant", "train."))]
    others = [key for key in others if key not in _PRECISION]
    return {key.replace("model.", ""): (a.config.get(key), b.config.get(key)) for key in _PRECISION} if others else {}


def _check_runs(name, a, b):
    """Raises UserError if a run is on both sides: it would be compared with itself."""
    runs = {find_rows.run_of(row): row for row in a}
    for row in b:
        if same := runs.get(find_rows.run_of(row)):
            raise UserError(f"not comparable: {row.path} of B is the run {same.path} of A ({name}), not another one")


def _metrics(a, b, requested, name, notes):
    recorded = {key for row in (*a, *b) for key in row.values}
    for key in requested:
        if key not in recorded:
            raise UserError(
                f"--metric={key}: no such metric{did_you_mean(key, recorded)}; known: {', '.join(sorted(recorded))}"
            )
        if columns.column(key, "", None).better is None:
            raise UserError(f"--metric={key}: neither more nor less of it is better, so that nothing can regress")
        for side, side_rows in (("A", a), ("B", b)):
            if not _positive(side_rows, key):
                raise UserError(f"not comparable: {key} of {name}: {side}'s is null: {_why_null(side_rows, key)}")
    if requested:
        return requested
    for side, side_rows, other in (("A", a, b), ("B", b, a)):
        for key in DEFAULT:
            if _positive(other, key) and not _positive(side_rows, key):
                notes.append(f"{key} of {name}: {side}'s is null, not compared: {_why_null(side_rows, key)}")
    return [key for key in DEFAULT if all(_positive(side, key) for side in (a, b))]


def _positive(side, key):
    return [row for row in side if row.values.get(key) is not None and row.values[key] > 0]


def _why_null(side, key):
    return next((row.reasons[key] for row in side if key in row.reasons), "not positive")


def _line(name, key, a, b, margin, requested, notes):
    column = columns.column(key, a[0].unit(key), None)
    for side, side_rows in (("A", a), ("B", b)):
        if missing := len(side_rows) - len(_positive(side_rows, key)):
            notes.append(f"{key} of {name}: {missing} of {len(side_rows)} rows of {side} are null or 0 and left out")
    why, a, b = _disturbance(a, b), _positive(a, key), _positive(b, key)
    if differs := comparability.find_difference((*a, *b), a[0], key, "A's first"):
        raise UserError(f"not comparable: {key} of {name}: {differs}")
    means = [statistics.geometric_mean([row.values[key] for row in side]) for side in (a, b)]
    if columns.is_timed(key) and why:
        notes.append(f"times of {name}: {why}")
        return MetricComparison(name, column, *means, None, STARVED)
    interval = _interval(key, a, b)
    if interval.low is None:
        return MetricComparison(name, column, *means, None, "no verdict: " + _too_few(a, b))
    return MetricComparison(name, column, *means, interval, statistics.verdict(interval, column.better, margin))


def _disturbance(a, b):
    """Why times of these rows are not compared, or None. In the blocks of one sweep a disturbance meets all rows."""
    sweeps = {(row.sweep.get("name"), row.path.parent.parent) for row in (*a, *b)}
    blocks = [{row.sweep.get("block") for row in side} for side in (a, b)]
    if len(sweeps) == 1 and blocks[0] == blocks[1] and comparability.in_blocks([*a, *b]):
        return None
    return comparability.starved([*a, *b])


def _too_few(a, b):
    if len(a) == len(b) == 1:
        return "one run a side: no interval"
    return f"{len(a)} and {len(b)} rows: an interval needs two a side"


def _interval(key, a, b):
    """The Interval of B/A: paired if every block has both, else of two independent samples."""
    exact, (blocks_a, blocks_b) = columns.is_exact(key), (_logs(side, key) for side in (a, b))
    if blocks_a.keys() == blocks_b.keys() and (len(blocks_a) > 1 or exact):
        return statistics.ratio_interval([blocks_b[block] - blocks_a[block] for block in blocks_a], exact)
    logs = [[math.log(row.values[key]) for row in side] for side in (a, b)]
    alike = exact and all(len(set(side)) == 1 for side in logs)
    if not alike and (interval := statistics.unpaired_interval(*logs)):
        return interval
    return statistics.ratio_interval([sum(logs[1]) / len(b) - sum(logs[0]) / len(a)], exact=alike)


def _logs(side, key):
    """`{block: mean logarithm}`."""
    logs_by_block = {}
    for row in side:
        logs_by_block.setdefault(row.block, []).append(math.log(row.values[key]))
    return {block: sum(logs) / len(logs) for block, logs in logs_by_block.items()}


def _lines(table):
    lines = [f"{'metric':<20}{'A':>12}{'B':>12}{'B/A':>9}  {'95 % interval':<17}B is"]
    for name in dict.fromkeys(line.variant for line in table):
        lines += ["-" * 92, name]
        for line in (line for line in table if line.variant == name):
            shown = "".join(f"{columns.format_value(value, line.column.unit):>12}" for value in (line.a, line.b))
            ratio = range_ = "–"
            if line.decided:
                ratio = f"{line.interval.ratio:.3f}"
                range_ = f"{line.interval.low:.3f} to {line.interval.high:.3f}"
            lines.append(f"{line.column.key:<20}{shown}{ratio:>9}  {range_:<17}{line.verdict}")
    return lines
