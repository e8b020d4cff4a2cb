"""Whether B regressed against A: the same metric of both, paired where they share blocks, with its interval."""

import math

from efficientllm.errors import UserError, did_you_mean
from efficientllm.report import columns, comparison, statistics

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


def compare(rows_a, rows_b, metrics=(), margin=statistics.MARGIN):
    """`(lines, regressed)`: a table, and whether a 95 % interval of any metric lies on the worse side of equal.

    A difference within `margin` on both ends of its interval is none. Raises UserError for rows that may not be
    compared: another task, device or effective batch, metrics that are null, one row a side.
    """
    table, regressed, untested = [], False, []
    for name, a, b in _matched(rows_a, rows_b):
        _same_group(name, a[0], b[0])
        for key in _metrics(a, b, metrics):
            column = columns.column(key, a[0].unit(key), None)
            interval, how = _interval(key, a, b, asked=bool(metrics))
            if how:
                untested.append(f"{key} of {name}: {how}")
                if interval is None:
                    continue
            said = "not tested: one pair" if how else statistics.verdict(interval, column.better, margin)
            table.append((name, column, _mean(a, key), _mean(b, key), interval, said))
            regressed |= said == "worse"
    if untested and not regressed and (metrics or all(row[-1].startswith("not tested") for row in table)):
        raise UserError(f"not comparable: {untested[0]}")
    if not table:
        raise UserError("not comparable: A and B have no metric in common that could regress; name one with --metric=")
    return _lines(table), regressed


def _matched(rows_a, rows_b):
    """`(name, rows of A, rows of B)` by variant; one variant a side is compared whatever its name."""
    sides = [{}, {}]
    for side, rows in zip(sides, (rows_a, rows_b), strict=True):
        for row in rows:
            if row.ok and not row.predicted:
                side.setdefault(row.sweep.get("variant") or row.identity, []).append(row)
    for name, side in zip("AB", sides, strict=True):
        if not side:
            raise UserError(f"not comparable: {name} holds no measured run that ended well")
    a, b = sides
    if len(a) == len(b) == 1:
        return [(_name(*a.values(), *b.values()), *a.values(), *b.values())]
    shared = [variant for variant in a if variant in b]
    if not shared:
        raise UserError("not comparable: A and B share no variant, and hold more than one each")
    return [(_name(a[variant]), a[variant], b[variant]) for variant in shared]


def _name(a, b=()):
    """The variant's name; of two that differ, `A's -> B's`."""
    names = [side[0].sweep.get("variant") or side[0].record.get("name") or side[0].identity for side in (a, b) if side]
    return " -> ".join(dict.fromkeys(names))


def _same_group(name, a, b):
    pairs = {
        "task": (a.task, b.task),
        "device": (comparison.device(a), comparison.device(b)),
        "effective batch": (comparison.batch(a), comparison.batch(b)),
    }
    for what, (of_a, of_b) in pairs.items():
        if of_a != of_b:
            raise UserError(f"not comparable: the {what} of {name} is {of_a} in A and {of_b} in B")


def _metrics(a, b, asked):
    known = a[0].values.keys() | b[0].values.keys()
    for key in asked:
        if key not in known:
            raise UserError(
                f"--metric={key}: no such metric{did_you_mean(key, known)}; known: {', '.join(sorted(known))}"
            )
        if columns.column(key, "", None).better is None:
            raise UserError(f"--metric={key}: neither more nor less of it is better, so that nothing can regress")
    return asked or [key for key in DEFAULT if all(_known(side, key) for side in (a, b))]


def _known(rows, key):
    return [row for row in rows if row.values.get(key) is not None and row.values[key] > 0]


def _interval(key, a, b, asked):
    """`(Interval or None, why it decides nothing or None)`."""
    for name, side in (("A", a), ("B", b)):
        if not _known(side, key):
            return None, f"{name}'s is null: {side[0].reasons.get(key, 'not positive')}"
    a, b = _known(a, key), _known(b, key)
    if differs := comparison.differences(b, a[0], key):
        if asked:
            raise UserError(f"not comparable: {key}: {differs.replace('the baseline', 'A')}")
        return None, differs.replace("the baseline", "A")
    blocks = {row.block: row for row in a}
    logs_B = [math.log(row.values[key] / blocks[row.block].values[key]) for row in b if row.block in blocks]
    exact = columns.is_exact(key)
    if len(logs_B) > 1 or (exact and logs_B):
        return statistics.ratio_interval(logs_B, exact), None
    interval = statistics.unpaired_interval(*([math.log(row.values[key]) for row in side] for side in (a, b)))
    if interval:
        return interval, None
    single = math.log(_mean(b, key) / _mean(a, key))
    if exact:
        return statistics.ratio_interval([single], exact=True), None
    return statistics.ratio_interval(
        [single]
    ), f"{len(a)} and {len(b)} rows: an interval needs two pairs; run more seeds"


def _mean(rows, key):
    return statistics.centre([row.values[key] for row in rows if row.values.get(key) is not None])


def _lines(table):
    lines = [f"{'metric':<20}{'A':>12}{'B':>12}{'B/A':>9}  {'95 % interval':<17}B is"]
    for name in dict.fromkeys(row[0] for row in table):
        lines += ["-" * 92, name]
        for _, column, a, b, interval, said in (row for row in table if row[0] == name):
            range_ = "–" if interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
            shown = f"{columns.show(a, column.unit):>12}{columns.show(b, column.unit):>12}"
            lines.append(f"{column.key:<20}{shown}{interval.ratio:>9.3f}  {range_:<17}{said}")
    return lines
