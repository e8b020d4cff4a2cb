"""Rows of `run.py` over time: what counts as a drop, and the figure."""

import dataclasses
import pathlib
import statistics
import typing

Row = dict[str, typing.Any]
DROP = 0.05  # share of the speed before
BEFORE = 5  # runs whose median a drop is measured from


def cpu_kind(row: Row) -> str:
    """Names the kind of CPU that a row was measured on: runs of one kind are compared."""
    cpu = row["cpu"]
    return f"{cpu['name']} {cpu['model']}, {cpu['cores']} cores ({' '.join(cpu['instructions']) or 'no AVX2'})"


def series(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Sorts rows, which are in the order of time: `{(comparison, kind of CPU): rows}`."""
    sorted_rows: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sorted_rows.setdefault((row["comparison"], cpu_kind(row)), []).append(row)
    return sorted_rows


@dataclasses.dataclass(frozen=True)
class Drop:
    """A comparison whose last two runs were both slower than those before them."""

    comparison: str
    kind: str
    before: float  # the median ratio of the runs before
    last: tuple[float, float]
    versions: tuple[str, ...]  # packages that changed since, such as "torch 2.13.0 to 2.14.0"

    def __str__(self):
        last = " and ".join(f"{ratio:.2f}" for ratio in self.last)
        changed = f"; changed since: {', '.join(self.versions)}" if self.versions else ""
        return f"{self.comparison}: {last} in the last two runs, {self.before:.2f} before, on {self.kind}{changed}"


def find_drops(rows: list[Row]) -> list[Drop]:
    """Lists the comparisons whose ratio is more than DROP below what it was, in the last two runs on a kind of CPU.

    What it was is the median of up to BEFORE runs before these two. One slow run is noise.
    """
    drops = []
    for (comparison, kind), of_kind in series(rows).items():
        *earlier, first, second = of_kind if len(of_kind) > 2 else [None, None]
        if not earlier:
            continue
        before = statistics.median(row["ratio"] for row in earlier[-BEFORE:])
        if max(first["ratio"], second["ratio"]) < (1 - DROP) * before:
            changed = _changed_versions(earlier[-1]["versions"], second["versions"])
            drops.append(Drop(comparison, kind, before, (first["ratio"], second["ratio"]), changed))
    return drops


def _changed_versions(before, after):
    names = sorted({*before, *after})
    return tuple(
        f"{name} {before.get(name)} to {after.get(name)}" for name in names if before.get(name) != after.get(name)
    )


def draw(rows: list[Row], file: pathlib.Path) -> None:
    """Draws a panel for each comparison: ratios with their intervals over runs, a line for each kind of CPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(map(cpu_kind, rows)))
    names = list(dict.fromkeys(row["comparison"] for row in rows))
    dates = {row["run"]: row["date"] for row in rows}
    at = {run: place for place, run in enumerate(sorted(dates))}
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.2 * lines), squeeze=False, sharex=True)
    of_series = series(rows)
    for panel, name in zip(grid.flat, names, strict=False):
        for colour, kind in enumerate(kinds):
            if measured := of_series.get((name, kind)):
                ratios = [row["ratio"] for row in measured]
                ends = [
                    [row["ratio"] - row["low"] for row in measured],
                    [row["high"] - row["ratio"] for row in measured],
                ]
                places = [at[row["run"]] for row in measured]
                panel.errorbar(places, ratios, ends, fmt="o-", color=f"C{colour}", capsize=2, markersize=3)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_title(name, fontsize=9)
        panel.set_ylim(0, 1.1 * max(panel.get_ylim()[1], 1))
        panel.grid(alpha=0.3)
    for panel in grid.flat[len(names) :]:
        panel.set_visible(False)
    shown = sorted(dates)[:: max(1, len(dates) // 5)]
    for place, panel in enumerate(grid.flat):
        panel.set_xlim(-0.5, len(dates) - 0.5)
        panel.set_xticks([at[run] for run in shown], [dates[run][5:] for run in shown], fontsize=7)
        panel.tick_params(labelbottom=place + columns >= len(names))  # the lowest of its column
    marks = [pyplot.Line2D([], [], color=f"C{colour}", marker="o", label=kind) for colour, kind in enumerate(kinds)]
    figure.legend(handles=marks, loc="lower left", fontsize=7, frameon=False)
    figure.suptitle("Speed over the peer's (small: over our own float32), 95 % intervals", fontsize=10)
    figure.tight_layout(rect=(0, 0.02 + 0.02 * len(kinds), 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
