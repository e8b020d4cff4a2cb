"""Figures of a report as PNG and SVG: ratios with intervals, a Pareto plot, the six metrics, loss curves, samples."""

import math
import pathlib
import typing
import warnings
from collections.abc import Sequence

from efficientllm.report import image_figures
from efficientllm.report.curves import Curves
from efficientllm.report.rows import Row
from efficientllm.runtime.atomic_write import replacing

_COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#dc2626",
    "#7c3aed",
    "#0891b2",
    "#be185d",
    "#4d7c0f",
    "#64748b",
    "#92400e",
)
_MOST, _LONGEST = 40, 40  # variants in a figure, letters of a name


def draw_figures(
    board: dict[str, typing.Any], curves: dict[str, Curves], folder: pathlib.Path, rows: Sequence[Row] = ()
) -> dict[str, list[tuple[str, str]]]:
    """Draws the figures of each group -> `{group name: [(title, path from the report), ...]}`.

    `rows` are those whose samples are drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    style: typing.Any = {
        "svg.hashsalt": "efficientllm",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    style |= {"text.parse_math": False}  # a name may hold dollars
    drawn, rows_by_path = {}, {str(row.path): row for row in rows}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a letter that no font has is drawn as a box
        for number, whole in enumerate(board["groups"], 1):
            group = _legible(whole)
            paths = {path: variant["variant"] for variant in group["variants"] for path in variant["paths"]}
            candidates = {
                "ratios": _ratios(group, board["columns"]),
                "pareto": _pareto(group, board["columns"]),
                "six": _radar(group),
                "loss": _loss({path: curves[path] for path in paths}, paths),
                "levels": image_figures.draw_levels(group, _repeat(len(group["variants"]))),
                "samples": image_figures.draw_samples(group, rows_by_path) if rows else None,
            }
            figures = [(kind, figure) for kind, figure in candidates.items() if figure]
            if len(group["variants"]) < len(whole["variants"]):
                for _, figure in figures:
                    figure.suptitle(f"the first {_MOST} of {len(whole['variants'])} variants", fontsize=8, y=1.02)
            drawn[group["name"]] = [_save(figure, folder, f"{number}_{kind}") for kind, figure in figures]
    return drawn


def _legible(group):
    """The group for figures: at most _MOST variants, names of at most _LONGEST letters."""
    shown, labels = group["variants"][:_MOST], {}
    for variant in shown:
        text = " ".join(variant["variant"].split()) or "?"
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
        text = f" {text}" if text.startswith("_") else text  # matplotlib leaves such names out of legends
        labels[variant["variant"]] = text if text not in labels.values() else f"{text} {len(labels) + 1}"
    pareto = {
        pair: {labels[variant]: share for variant, share in shares.items() if variant in labels}
        for pair, shares in group["pareto"].items()
    }
    variants = [variant | {"variant": labels[variant["variant"]]} for variant in shown]
    return group | {"variants": variants, "baseline": labels.get(group["baseline"]), "pareto": pareto}


def _save(figure, folder, name):
    import matplotlib.pyplot as plt

    with replacing(folder / f"{name}.png") as file:
        figure.savefig(file, dpi=120, bbox_inches="tight", format="png")
    with replacing(folder / f"{name}.svg") as file:
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None}, format="svg")
    plt.close(figure)
    return name.partition("_")[2], f"figures/{name}.png"


def _figure(width, height, **axes):
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), **axes)


def _ratios(group, columns):
    """Ratios to the baseline with intervals, one panel a metric; the band marks what counts as equal."""
    compared = [v for v in group["variants"] if v["variant"] != group["baseline"]]
    wanted = ("eval_loss", "al_s", "tpot_s", "amu_gb", "j_per_token", "flops_per_token")
    keys = [c["key"] for c in columns if c["key"] in wanted and any("ratio" in v["cells"][c["key"]] for v in compared)]
    if not keys:
        return None
    figure, axes_1M = _figure(
        2.4 * len(keys) + 1, 0.35 * len(compared) + 1, ncols=len(keys), sharey=True, squeeze=False
    )
    for axes, key in zip(axes_1M[0], keys, strict=True):
        axes.axvspan(1 / 1.02, 1.02, color="#94a3b8", alpha=0.3, lw=0)
        axes.axvline(1, color="#475569", lw=0.8)
        for y, variant in enumerate(compared):
            cell = variant["cells"][key]
            if "ratio" in cell:
                axes.plot(cell["ratio"], y, "o", color=_COLOURS[0], ms=4)
                if cell["low"] is not None:
                    axes.plot([cell["low"], cell["high"]], [y, y], color=_COLOURS[0], lw=1.5)
        axes.set_title(f"{key} / {group['baseline']}", fontsize=8)
        axes.set_yticks(range(len(compared)), [variant["variant"] for variant in compared])
    axes_1M[0][0].invert_yaxis()
    return figure


def pareto_pair(group: dict[str, typing.Any], columns: Sequence[dict]) -> tuple[str, str, list[dict]] | None:
    """The first pair of quality and cost that two or more variants have -> `(x, y, variants)`, or None."""
    cost = ("j_per_token", "tpot_s", "al_s", "amu_gb", "flops_per_token")
    for y in ("eval_loss", "loss", "mcr"):
        for x in cost:
            variants = [v for v in group["variants"] if all(v["cells"][key]["mean"] is not None for key in (x, y))]
            if len(variants) > 1:
                return x, y, variants
    return None


def _refused(group, variant, keys):
    """Why a variant in this plot is not compared, or None."""
    if variant["variant"] == group["baseline"]:
        return None
    return next((variant["cells"][key]["reason"] for key in keys if variant["cells"][key]["reason"]), None)


def _pareto(group, columns):
    pair = pareto_pair(group, columns)
    if not pair:
        return None
    x, y, variants = pair
    units = {column["key"]: column["unit"] for column in columns}
    shares = group["pareto"].get(f"{x}|{y}") or group["pareto"].get(f"{y}|{x}") or {}
    figure, axes = _figure(5, 3.5)
    for variant, colour in zip(variants, _repeat(len(variants)), strict=True):
        at = [variant["cells"][key]["mean"] for key in (x, y)]
        share, refused = shares.get(variant["variant"]), _refused(group, variant, (x, y))
        mark = (
            {"marker": "x", "alpha": 0.5}
            if refused
            else {"marker": "o", "alpha": 1 if share is None else 0.25 + 0.75 * share}
        )
        axes.plot(*at, color=colour, **mark)
        label = variant["variant"] if share is None else f"{variant['variant']} {share:.0%}"
        label += " (not compared)" if refused else ""
        axes.annotate(label, at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"{x} ({units[x]})")
    axes.set_ylabel(f"{y} ({units[y]})")
    axes.margins(0.2)
    axes.set_title("probability of being non-dominated" if shares else "", fontsize=9)
    return figure


def _radar(group):
    """Radar plot of the six metrics, normalised to 0.1..1; a metric that no variant has is named in the title."""
    keys = [key for key in group["six"] if any(v["normalised"][key] is not None for v in group["variants"])]
    if len(keys) < 3:
        return None
    angles = [2 * math.pi * i / len(keys) for i in range(len(keys) + 1)]
    figure, axes = _figure(4.5, 4.5, subplot_kw={"projection": "polar"})
    for variant, colour in zip(group["variants"], _repeat(len(group["variants"])), strict=True):
        values = [variant["normalised"][key] for key in keys]
        if None not in values:
            axes.plot(angles, [*values, values[0]], color=colour, lw=1.5, label=variant["variant"])
    axes.set_xticks(angles[:-1], keys)
    axes.set_ylim(0, 1)
    missing = [key for key in group["six"] if key not in keys]
    axes.set_title(f"1 is best; not measured: {', '.join(missing)}" if missing else "1 is best", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1.05, 1), frameon=False)
    return figure


def _loss(curves, variants):
    losses = {path: run_curves["loss"] for path, run_curves in curves.items() if "loss" in run_curves}
    if not losses:
        return None
    names = list(dict.fromkeys(variants.values()))
    colours = dict(zip(names, _repeat(len(names)), strict=True))
    figure, axes = _figure(6, 3.5)
    for path, curve in losses.items():
        axes.plot(curve["steps"], curve["values"], color=colours[variants[path]], lw=1, label=variants[path])
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nat)")
    return figure


def _repeat(count):
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
