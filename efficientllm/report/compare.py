"""Whether B regressed against A: the same metric of both, paired where they share blocks, with its interval.

Every row of both sides is looked at: what differs in setting is refused by name, what is null is said and left out,
copies of a run count once. A technique (mixer, ffn, adapter, quant, ...) may differ: it is what is compared.
"""

import dataclasses
import math

from efficientllm.errors import UserError, did_you_mean
from efficientllm.report import columns, comparable, find, rows, statistics

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
# Precision is the technique where nothing else differs, and else something else that differs.
_PRECISION = ("model.precision", "infer.precision")


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric of one variant; `decided` is False where no verdict could be had."""

    variant: str
    column: columns.Column
    a: float
    b: float
    interval: statistics.Interval | None
    said: str

    @property
    def decided(self):
        return self.interval is not None and self.interval.low is not None and self.said != statistics.WIDE


def compare(rows_a, rows_b, metrics=(), margin=statistics.MARGIN):
    """`(lines, status)`: a table with what is to be said of it, and OK, REGRESSED or UNDECIDED.

    REGRESSED: a 95 % interval of any metric lies on the worse side of equal; a difference within `margin` on both ends
    of it is none. UNDECIDED: none does, and of some metric there is no verdict (one run a side, a starved machine, an
    interval that says nothing). Raises UserError for rows that may not be compared.
    """
    table, notes = [], []
    matched = _matched(rows_a, rows_b, notes)
    for name, a, b in matched:
        keys = _metrics(a, b, metrics, name, notes)
        _check_setting(name, a, b, keys)
        table += [_line(name, key, a, b, margin, asked=bool(metrics), notes=notes) for key in keys]
    if not table:
        raise UserError("not comparable: A and B have no metric in common that could regress; name one with --metric=")
    for name, a, b in matched:
        _check_runs(name, a, b)
    regressed = any(line.said == "worse" for line in table)
    open_ = [line for line in table if not line.decided]
    status = REGRESSED if regressed else UNDECIDED if open_ else OK
    return [*_lines(table), *dict.fromkeys(notes), "", _conclusion(status, open_)], status


def _conclusion(status, undecided):
    if status == REGRESSED:
        return "B regressed against A"
    if status == OK:
        return "no regression seen"
    keys = ", ".join(dict.fromkeys(line.column.key for line in undecided))
    remedy = "more runs of each (another config.seed) would give one"
    if any(line.said == STARVED for line in undecided):
        remedy = "run both again on a machine of their own, or as variants of one sweep"
    return f"undecided: no verdict on {keys}; {remedy}"


def _matched(rows_a, rows_b, notes):
    """`(name, rows of A, rows of B)` by variant; one variant a side is compared whatever its name."""
    sides = [{}, {}]
    for name, side, own in zip("AB", sides, (rows_a, rows_b), strict=True):
        for row in own:
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
        alone = [_name(own) for variant, own in side.items() if variant not in shared]
        if alone:
            notes.append(f"{name} alone has {', '.join(sorted(set(alone)))}: not compared")
    return [(_name(a[variant]), a[variant], b[variant]) for variant in shared]


def _name(a, b=()):
    """The variant's name; of two that differ, `A's -> B's`."""
    names = [side[0].sweep.get("variant") or side[0].record.get("name") or side[0].identity for side in (a, b) if side]
    name = " -> ".join(dict.fromkeys(names))
    if b and names[0] == names[1] and (changes := rows.changes(a[0], b[0])):
        name += f" ({', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''})"
    return name


def _check_setting(name, a, b, keys):
    """Raises UserError for any row of either side that ran in another setting than the first of A."""
    first, timed = a[0], any(not columns.is_exact(key) for key in keys)
    for side, own in (("A", a), ("B", b)):
        for row in own:
            pairs = {
                "task": (first.task, row.task),
                "device": (comparable.device(first), comparable.device(row)),
                "effective batch": (comparable.batch(first), comparable.batch(row)),
                **_precision(first, row),
            }
            if timed:
                found = comparable.training(row, first, "" if "bits_per_byte" not in keys else "bits_per_byte")
                pairs |= {what: (expected, value) for what, (value, expected) in found.items()}
            for what, (expected, value) in pairs.items():
                if value != expected and None not in (value, expected):
                    raise UserError(
                        f"not comparable: the {what} of {name} is {expected} in A ({first.path.parent}) and {value} "
                        f"in {side} ({row.path.parent})"
                    )


def _precision(a, b):
    if a.kind == "infer":
        return {}
    others = [key for key in rows.differing(a, b) if key.startswith(("model.", "adapter", "quant", "train."))]
    others = [key for key in others if key not in _PRECISION]
    return {key.replace("model.", ""): (a.config.get(key), b.config.get(key)) for key in _PRECISION} if others else {}


def _check_runs(name, a, b):
    """Raises UserError where both sides hold one run, which would be compared with itself."""
    runs = {find.run_of(row): row for row in a}
    for row in b:
        if same := runs.get(find.run_of(row)):
            raise UserError(f"not comparable: {row.path} of B is the run {same.path} of A ({name}), not another one")


def _metrics(a, b, asked, name, notes):
    known = {key for row in (*a, *b) for key in row.values}
    for key in asked:
        if key not in known:
            raise UserError(
                f"--metric={key}: no such metric{did_you_mean(key, known)}; known: {', '.join(sorted(known))}"
            )
        if columns.column(key, "", None).better is None:
            raise UserError(f"--metric={key}: neither more nor less of it is better, so that nothing can regress")
        for side, own in (("A", a), ("B", b)):
            if not _known(own, key):
                raise UserError(f"not comparable: {key} of {name}: {side}'s is null: {_why_null(own, key)}")
    if asked:
        return asked
    for side, own, other in (("A", a, b), ("B", b, a)):
        for key in DEFAULT:
            if _known(other, key) and not _known(own, key):
                notes.append(f"{key} of {name}: {side}'s is null, not compared: {_why_null(own, key)}")
    return [key for key in DEFAULT if all(_known(side, key) for side in (a, b))]


def _known(side, key):
    return [row for row in side if row.values.get(key) is not None and row.values[key] > 0]


def _why_null(side, key):
    return next((row.reasons[key] for row in side if key in row.reasons), "not positive")


def _line(name, key, a, b, margin, asked, notes):
    column = columns.column(key, a[0].unit(key), None)
    for side, own in (("A", a), ("B", b)):
        if missing := len(own) - len(_known(own, key)):
            notes.append(f"{key} of {name}: {missing} of {len(own)} rows of {side} are null or 0 and left out")
    why, a, b = _unquiet(a, b), _known(a, key), _known(b, key)
    if differs := comparable.differences((*a, *b), a[0], key, "A's first"):
        raise UserError(f"not comparable: {key} of {name}: {differs}")
    means = [statistics.centre([row.values[key] for row in side]) for side in (a, b)]
    if columns.is_timed(key) and why:
        notes.append(f"times of {name}: {why}")
        return Line(name, column, *means, None, STARVED)
    interval = _interval(key, a, b)
    if interval.low is None:
        return Line(name, column, *means, None, "no verdict: " + _too_few(a, b))
    return Line(name, column, *means, interval, statistics.verdict(interval, column.better, margin))


def _unquiet(a, b):
    """Why times of these rows are not compared, or None; in the same blocks of one sweep what disturbs one disturbs
    all."""
    sweeps = {(row.sweep.get("name"), row.path.parent.parent) for row in (*a, *b)}
    blocks = [{row.sweep.get("block") for row in side} for side in (a, b)]
    if len(sweeps) == 1 and blocks[0] == blocks[1] and comparable.in_blocks([*a, *b]):
        return None
    return comparable.starved([*a, *b])


def _too_few(a, b):
    if len(a) == len(b) == 1:
        return "one run a side: no interval"
    return f"{len(a)} and {len(b)} rows: an interval needs two a side"


def _interval(key, a, b):
    """The Interval of B over A: paired where every row has its partner in a block, else of two samples."""
    exact, (blocks_a, blocks_b) = columns.is_exact(key), (_logs(side, key) for side in (a, b))
    if blocks_a.keys() == blocks_b.keys() and (len(blocks_a) > 1 or exact):
        return statistics.ratio_interval([blocks_b[block] - blocks_a[block] for block in blocks_a], exact)
    logs = [[math.log(row.values[key]) for row in side] for side in (a, b)]
    alike = exact and all(len(set(side)) == 1 for side in logs)
    if not alike and (found := statistics.unpaired_interval(*logs)):
        return found
    return statistics.ratio_interval([sum(logs[1]) / len(b) - sum(logs[0]) / len(a)], exact=alike)


def _logs(side, key):
    """`{block: mean logarithm}`."""
    found = {}
    for row in side:
        found.setdefault(row.block, []).append(math.log(row.values[key]))
    return {block: sum(logs) / len(logs) for block, logs in found.items()}


def _lines(table):
    lines = [f"{'metric':<20}{'A':>12}{'B':>12}{'B/A':>9}  {'95 % interval':<17}B is"]
    for name in dict.fromkeys(line.variant for line in table):
        lines += ["-" * 92, name]
        for line in (line for line in table if line.variant == name):
            shown = "".join(f"{columns.show(value, line.column.unit):>12}" for value in (line.a, line.b))
            ratio = range_ = "–"
            if line.decided:
                ratio = f"{line.interval.ratio:.3f}"
                range_ = f"{line.interval.low:.3f} to {line.interval.high:.3f}"
            lines.append(f"{line.column.key:<20}{shown}{ratio:>9}  {range_:<17}{line.said}")
    return lines
