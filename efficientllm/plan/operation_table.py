"""Table of the operations of a program by kind, as it is printed: measured, or at the least time by roofline."""

from collections.abc import Sequence

from efficientllm.plan.operations import KindTotal

HEADING = f"{'':<13}{{:>10}}{'share':>7}{'GFLOP':>10}{'GB':>9}{'kernels':>9}  {{:<15}}costliest"


def lines(rows: Sequence[KindTotal], step_s: float | None = None) -> list[str]:
    """Formats a row for each kind; `step_s` is the measured time that shares are of, and whose rest is idle.

    Without it times are the least by roofline, and shares are of their sum, or of bytes where no time is known.
    """
    unknown = any(row.seconds is None for row in rows)
    total = step_s or (sum(row.bytes for row in rows) if unknown else sum(row.seconds or 0 for row in rows))
    heading = HEADING.format("ms", "of peak") if step_s else HEADING.format("least ms", "bound by")
    table = [heading, *(_line(row, row.bytes if unknown else row.seconds, total) for row in rows)]
    if step_s:
        idle = max(0.0, step_s - sum(row.seconds or 0 for row in rows))
        table.append(f"{'idle':<13}{idle * 1e3:>10,.4g}{idle / step_s:>7.0%}")
    return table


def _line(row, cost, total):
    milliseconds = "" if row.seconds is None else f"{row.seconds * 1e3:,.4g}"
    flops = "?" if row.flops is None else f"{row.flops / 1e9:,.4g}"
    share = f"{cost / total:.0%}" if total else ""
    peak = row.bound or "" if row.of_peak is None else f"{row.of_peak:.0%} of {row.bound}"
    return (
        f"{row.kind:<13}{milliseconds:>10}{share:>7}{flops:>10}{row.bytes / 1e9:>9,.3g}{row.kernels:>9,}  "
        f"{peak:<15}{row.costliest}"
    ).rstrip()
