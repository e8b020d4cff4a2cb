"""The report as Markdown."""

import re

from efficientllm.report import statistics
from efficientllm.report.columns import show

_ALWAYS = ("eval_loss", "j_per_token", "tokens_per_s", "peak_memory_bytes")


def text(board, figures):
    """`report.md` of a leaderboard; `figures` are `{group name: [(title, file), ...]}` relative to it."""
    board, figures = literal(board), {literal(name): shown for name, shown in figures.items()}
    parts = ["# Report", _counts(board)]
    for group in board["groups"]:
        parts += [f"## {group['name']}", _setting(group), _table(group, board["columns"]), _score(group)]
        parts += [_notes(group), _noise(group), _ranks(group, board["columns"])]
        parts += [f"![{title}]({file})" for title, file in figures.get(group["name"], ())]
        parts += [_study(entry) for entry in group["study"]]
    parts += [_grid(found) for found in board.get("grids", ())]
    parts += ["## The study's claims\n\n" + _tested_first(board["claims"])]
    parts += [board["forecasts"] and FORECASTS + _claims(board["forecasts"])]
    parts += [_failures(board), _left_out(board), METHOD]
    return "\n\n".join(part for part in parts if part) + "\n"


# What Markdown would read as more than letters: marks of its own, tags, entities, links, emphasis at a word's edge.
_MARKS = re.compile(r"[\\`*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=\()|(?<!\w)_|_(?!\w)")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def literal(value):
    """The texts in nested lists and dicts as Markdown that shows their letters; keys stay."""
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [literal(each) for each in value]
    if not isinstance(value, str):
        return value
    return " ".join(_MARKS.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), value).splitlines())


METHOD = """## How to read it

A row is one process. A ratio is to the baseline of the same block, paired in logs; its 95 % interval is a bootstrap
over blocks (Student's t below six). "No difference seen" is not "equal": equal is an interval within ±2 %. Rows of
another device or effective batch share no ranking; in one, measured metrics are compared at equal training, energy
scope and versions, and times of starved rows (the machine was not theirs alone) in randomised blocks only. A verdict
that is no larger than the noise floor is withheld. "–" is a null: the reason stands in
`leaderboard.json` and in the page's titles."""


FORECASTS = """## What plans say of the claims

Predicted, not measured: bytes and FLOPs of programs that were compiled for hardware that was not there.

"""


def _counts(board):
    failed = len(board["failures"])
    return f"Rows: {board['rows']}. Rankings, never mixed: {len(board['groups'])}. Failed rows: {failed}."


def _setting(group):
    return f"Baseline: {group['baseline'] or 'no row of it is here'}. Blocks: {group['blocks']}."


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def chosen(group, columns):
    """The columns shown at first: the study's six, and of some others those that hold a value."""
    shown = [*group["six"], *_ALWAYS]
    held = {key for variant in group["variants"] for key, cell in variant["cells"].items() if cell["mean"] is not None}
    return [c for key in shown for c in columns if c["key"] == key and (key in group["six"] or key in held)]


def _table(group, columns):
    shown = chosen(group, columns)
    head = ["variant", "rows", *(f"{c['label']} ({c['unit']})" for c in shown)]
    rows = []
    for variant in group["variants"]:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in variant["outcomes"].items())
        cells = [_cell(variant["cells"][c["key"]], c["unit"]) for c in shown]
        rows.append([f"**{variant['variant']}**", outcomes, *cells])
    return table(head, rows)


def _cell(cell, unit):
    value = show(cell["mean"], unit) + (" (starved)" if cell.get("starved") else "")
    if "ratio" not in cell:
        return f"{value} (not compared)" if cell["mean"] is not None and cell["reason"] else value
    said = ratio(cell)
    said = said if said == statistics.WIDE else f"×{said}"
    return f"{value} ({said}, within noise)" if cell["verdict"].startswith("withheld") else f"{value} ({said})"


def ratio(entry):
    """`1.24, 1.20–1.28`: a ratio and its interval."""
    if entry["low"] is None:
        return f"{entry['ratio']:.3f}, no interval"
    if statistics.is_wide(entry["low"], entry["high"]):
        return statistics.WIDE
    return f"{entry['ratio']:.3f}, {entry['low']:.3f}–{entry['high']:.3f}"


def _notes(group):
    """What must be known of the rows, and why values are not compared; each once."""
    lines = [f"- {variant['variant']}: {note}" for variant in group["variants"] for note in variant["notes"]]
    for variant in group["variants"]:
        cells = {key: cell for key, cell in variant["cells"].items() if cell["mean"] is not None and cell["reason"]}
        for reason in dict.fromkeys(cell["reason"] for cell in cells.values()):
            keys = [key for key, cell in cells.items() if cell["reason"] == reason]
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            lines.append(f"- {variant['variant']}: not compared in {', '.join(keys[:4])}{more}: {reason}")
    return "\n".join(lines)


def _score(group):
    of, over = group["score"]["of"], group["score"]["over"]
    if not of:
        return "Efficiency Score: null, no metric of Eq. 12 is known of every variant."
    scores = ", ".join(f"{v['variant']} {v['efficiency_score']:.3f}" for v in group["variants"] if v["variant"] in over)
    part = "" if len(of) == 5 else f", {len(of)} of Eq. 12's five: not the study's score"
    return f"Efficiency Score over the group {', '.join(over)} (mean of the ratios of {', '.join(of)}{part}): {scores}."


def _noise(group):
    if not group["noise"]:
        return "Noise floor: unknown, no block holds the baseline twice."
    head = ["metric", "baseline / itself", "pairs", "smallest effect seen in 4 sweeps of 5", "blocks to see 3 %"]
    rows = []
    for key, found in group["noise"].items():
        smallest = "–" if found["smallest_effect"] is None else f"{found['smallest_effect']:.1%}"
        rows.append([key, ratio(found), found["pairs"], smallest, found["blocks_for_3_percent"]])
    return f"Noise floor, from the baseline against itself:\n\n{table(head, rows)}"


def _ranks(group, columns):
    units = {column["key"]: column for column in columns}
    rows = []
    for key in group["wins"]:
        if units[key]["better"]:
            ranked = [(v["cells"][key], v["variant"]) for v in group["variants"] if "rank" in v["cells"][key]]
            ranked.sort(key=lambda pair: pair[0]["rank"])
            order = ", ".join(f"{name} {c['rank']:g} ({c['rank_low']:g}–{c['rank_high']:g})" for c, name in ranked)
            rows.append([key, units[key]["better"], order])
    return rows and f"Ranks with 95 % intervals:\n\n{table(['metric', 'better', 'rank (interval)'], rows)}"


def _study(entry):
    head = ["variant", "metric", "study / its baseline", "here", ""]
    rows = [
        [
            row["variant"],
            row["metric"],
            f"{row['study_ratio']:.3f}",
            ratio(row) if "ratio" in row else f"– ({row['reason']})",
            row["agrees"],
        ]
        for row in entry["rows"]
    ]
    note = f" {entry['note']}." if entry["note"] else ""
    return f"Beside the study, table `{entry['table']}` ({entry['trust']}).{note}\n\n{table(head, rows)}"


def _grid(grid):
    head = ["variant", f"{grid['key']}", "held-out loss", "", "tries, wall time"]
    rows = []
    for variant, found in grid["variants"].items():
        seconds = sum(each["seconds"] or 0 for each in found["tries"])
        for each in found["tries"]:
            loss = "–" if each["eval_loss"] is None else f"{each['eval_loss']:.4f}"
            mark = "chosen" if each["value"] == found["chosen"] else each["outcome"]
            rows.append([literal(variant), each["value"], loss, mark, f"{len(found['tries'])}, {seconds:.0f} s"])
    return (
        f"## What sweep {grid['sweep']} chose before it compared\n\nThe value of the least held-out loss at the first "
        "seed, on the text that the rankings are scored on: losses are that much flattered, of every variant alike.\n\n"
        f"{table(head, rows)}"
    )


def _tested_first(claims):
    """The claims that these rows say something of, and the others folded."""
    tested = [claim for claim in claims if any("ratio" in pair for pair in claim["pairs"])]
    others = [claim for claim in claims if claim not in tested]
    folded = f"<details><summary>{len(others)} that cannot be tested here</summary>\n\n{_claims(others)}\n\n</details>"
    return "\n\n".join([*([_claims(tested)] if tested else []), *([folded] if others else [])])


def _claims(claims):
    rows = []
    for claim in claims:
        found = "; ".join(f"{p['variant']} / {p['against']} {ratio(p)}" for p in claim["pairs"] if "ratio" in p)
        said = f"{claim['metric']} ratio {claim['ratio']}"
        rows.append(
            [claim["name"], f"{claim['says']} ({claim['where']})", said, claim["status"], found or claim["reason"]]
        )
    return table(["claim", "says", "checked as", "here", "ratios, or why not"], rows)


def _left_out(board):
    lines = board.get("left_out") or []
    return lines and "## Left out\n\n" + "\n".join(f"- {line.removeprefix('left out: ')}" for line in lines)


def _failures(board):
    """Failed, running and stopped runs, each with the last that it said."""
    lines = [[f["variant"], f["block"], f["outcome"], f["path"], f["said"]] for f in board["failures"]]
    lines += [["?", "", run["state"], run["path"], run["said"]] for run in board["without_row"]]
    return lines and "## Failed and unfinished runs\n\n" + table(["variant", "block", "outcome", "row", "said"], lines)
