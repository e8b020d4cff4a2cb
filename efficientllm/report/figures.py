"""The report's figures as PNG and SVG: ratios with intervals, a Pareto set, the six metrics, curves of the loss."""

import math
import warnings

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
_MOST, _LONGEST = 40, 40  # variants of a figure, letters of a name


def draw(board, curves, folder):
    """Draws what there is of each group -> `{group name: [(title, path from the report), ...]}`."""
    import matplotlib

    matplotlib.use("Agg")
    style = {"svg.hashsalt": "efficientllm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False}  # a name may hold dollars
    drawn = {}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for a letter that no font has
        for number, whole in enumerate(board["groups"], 1):
            group = _legible(whole)
            paths = {path: variant["variant"] for variant in group["variants"] for path in variant["paths"]}
            made = {
                "ratios": _ratios(group, board["columns"]),
                "pareto": _pareto(group, board["columns"]),
                "six": _radar(group),
                "loss": _loss({path: curves[path] for path in paths}, paths),
            }
            kept = [(kind, figure) for kind, figure in made.items() if figure]
            if len(group["variants"]) < len(whole["variants"]):
                for _, figure in kept:
                    figure.suptitle(f"the first {_MOST} of {len(whole['variants'])} variants", fontsize=8, y=1.02)
            drawn[group["name"]] = [_save(figure, folder, f"{number}_{kind}") for kind, figure in kept]
    return drawn


def _legible(group):
    """The group as figures show it: no more variants than can be told apart, and names that have room."""
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
    """A dot and its interval a variant, one panel a metric; the band is what counts as equal."""
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


def pareto_pair(group, columns):
    """The first pair that holds two variants or more: quality against time, energy or memory."""
    cost = ("j_per_token", "tpot_s", "al_s", "amu_gb", "flops_per_token")
    for y in ("eval_loss", "loss", "mcr"):
        for x in cost:
            held = [v for v in group["variants"] if all(v["cells"][key]["mean"] is not None for key in (x, y))]
            if len(held) > 1:
                return x, y, held
    return None


def _refused(group, variant, keys):
    """Why a variant stands in this plot without being compared, or None."""
    if variant["variant"] == group["baseline"]:
        return None
    return next((variant["cells"][key]["reason"] for key in keys if variant["cells"][key]["reason"]), None)


def _pareto(group, columns):
    found = pareto_pair(group, columns)
    if not found:
        return None
    x, y, held = found
    units = {column["key"]: column["unit"] for column in columns}
    shares = group["pareto"].get(f"{x}|{y}") or group["pareto"].get(f"{y}|{x}") or {}
    figure, axes = _figure(5, 3.5)
    for variant, colour in zip(held, _repeat(len(held)), strict=True):
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
    """The six metrics, normalised to 0.1..1 in the group; a metric that no variant has is left out and named."""
    known = [key for key in group["six"] if any(v["normalised"][key] is not None for v in group["variants"])]
    if len(known) < 3:
        return None
    angles = [2 * math.pi * i / len(known) for i in range(len(known) + 1)]
    figure, axes = _figure(4.5, 4.5, subplot_kw={"projection": "polar"})
    for variant, colour in zip(group["variants"], _repeat(len(group["variants"])), strict=True):
        values = [variant["normalised"][key] for key in known]
        if None not in values:
            axes.plot(angles, [*values, values[0]], color=colour, lw=1.5, label=variant["variant"])
    axes.set_xticks(angles[:-1], known)
    axes.set_ylim(0, 1)
    missing = [key for key in group["six"] if key not in known]
    axes.set_title(f"1 is best; not measured: {', '.join(missing)}" if missing else "1 is best", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1.05, 1), frameon=False)
    return figure


def _loss(curves, variants):
    held = {path: found["loss"] for path, found in curves.items() if "loss" in found}
    if not held:
        return None
    names = list(dict.fromkeys(variants.values()))
    colours = dict(zip(names, _repeat(len(names)), strict=True))
    figure, axes = _figure(6, 3.5)
    for path, curve in held.items():
        axes.plot(curve["steps"], curve["values"], color=colours[variants[path]], lw=1, label=variants[path])
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nat)")
    return figure


def _repeat(count):
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
