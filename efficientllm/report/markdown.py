"""The report as Markdown."""

import re
import typing
from collections.abc import Iterable, Sequence

from efficientllm.report import pairwise, statistics
from efficientllm.report.columns import format_value

_QUALITY = ("eval_loss", "exact_match", "eval_loss_also", "fid", "fd_own", "fd_own_floor", "nearest_ratio")
_ALWAYS = (*_QUALITY, "j_per_token", "j_per_image", "tokens_per_s", "images_per_s", "peak_memory_bytes")
_MOST_RATIOS = 6  # of a claim, each written


def markdown_report(
    board: dict[str, typing.Any], figures: dict[str, list[tuple[str, str]]], drawn_claims: Iterable[str] = ()
) -> str:
    """Text of `report.md` for a leaderboard; `figures` is `{group name: [(title, file relative to it), ...]}`.

    `drawn_claims` are the names of claims that have a figure.
    """
    board, figures = literal(board), {literal(name): paths for name, paths in figures.items()}
    sections = ["# Report", _counts(board), *_answers(board)]
    for group in board["groups"]:
        sections += [f"## {group['name']}", _setting(group), _table(group, board["columns"]), _score(group)]
        sections += [_notes(group), _noise(group), _ranks(group, board["columns"])]
        sections += [f"![{title}]({file})" for title, file in figures.get(group["name"], ())]
        sections += [_study(entry) for entry in group["study"]]
    sections += [_grid(grid) for grid in board.get("grids", ())]
    sections += ["## The study's claims\n\n" + _tested_first(board["claims"])]
    sections += [f"![{name}](figures/claim_{name}.svg)" for name in drawn_claims]
    sections += [board["forecasts"] and FORECASTS + _claims(board["forecasts"])]
    sections += [_planned(table) for table in board.get("planned", ())]
    sections += [_failures(board), _left_out(board), METHOD]
    return "\n\n".join(section for section in sections if section) + "\n"


# Text that Markdown would interpret: its marks, tags, entities, links, emphasis at the edge of a word.
_MARKS = re.compile(r"[\\`*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=\()|(?<!\w)_|_(?!\w)")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def literal(value: typing.Any) -> typing.Any:
    """Escapes the texts in nested lists and dicts for Markdown; keys stay."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [literal(item) for item in value]
    if not isinstance(value, str):
        return value
    return " ".join(_MARKS.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), value).splitlines())


METHOD = """## How to read it

A row is one process. A ratio is to the baseline of the same block, paired in logs; its 95 % interval is a bootstrap
over blocks (Student's t below six). "No difference seen" is not "equal": equal is an interval within ±2 %. Rows of
another device, effective batch, objective, autoencoder or side of the pictures share no ranking; in one, measured
metrics are compared at equal training, energy scope and versions, and times of starved rows (the machine was not theirs
alone) in randomised blocks only. A verdict that is no larger than the noise floor is withheld. "–" is a null: the
reason stands in `leaderboard.json` and in the page's titles."""


FORECASTS = """## What plans say of the claims

Predicted, not measured: bytes and FLOPs of programs that were compiled for hardware that was not there.

"""


def _counts(board):
    failed = len(board["failures"])
    counts = f"Rows: {board['rows']}. Rankings, never mixed: {len(board['groups'])}. Failed rows: {failed}."
    return f"{counts} {pairwise.format_share(board['pairwise'])}"


def _answers(board):
    """Standing questions with their answers, and the facts of a board."""
    for entry in board.get("answers", ()):
        lines = [f"## {entry['asked']}", f"Asked as: `{entry['query']}`."]
        lines += [f"**{a['text']}**. {a['next']} ({a['group']})" for a in entry["answers"] if a["text"]]
        yield "\n\n".join([*lines, *([entry["missing"]] if entry["missing"] else [])])
    yield "\n".join(f"- {fact}" for fact in board.get("facts", ()))


def _planned(table):
    return f"## Planned, not measured: {table['source']}\n\n{markdown_table(table['heads'], table['rows'])}"


def _setting(group):
    baseline = group["baseline"] or "no row of it is here"
    return f"Baseline: {baseline}. Blocks: {group['blocks']}. {group['setting']}".strip()


def markdown_table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Formats a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def first_columns(group: dict[str, typing.Any], columns: Sequence[dict]) -> list[dict]:
    """The columns of the main table: the study's six metrics, and some others if a variant has them."""
    shown = [*group["six"], *_ALWAYS]
    recorded = {
        key for variant in group["variants"] for key, cell in variant["cells"].items() if cell["mean"] is not None
    }
    return [c for key in shown for c in columns if c["key"] == key and (key in group["six"] or key in recorded)]


def _table(group, columns):
    shown = first_columns(group, columns)
    head = ["variant", "rows", *(f"{c['label']} ({c['unit']})" for c in shown)]
    rows = []
    for variant in group["variants"]:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in variant["outcomes"].items())
        cells = [_cell(variant["cells"][c["key"]], c["unit"]) for c in shown]
        rows.append([f"**{variant['variant']}**", outcomes, *cells])
    return markdown_table(head, rows)


def _cell(cell, unit):
    value = format_value(cell["mean"], unit) + (" (starved)" if cell.get("starved") else "")
    if "ratio" not in cell:
        return f"{value} (not compared)" if cell["mean"] is not None and cell["reason"] else value
    text = format_ratio(cell)
    text = text if text == statistics.WIDE else f"×{text}"
    return f"{value} ({text}, within noise)" if cell["verdict"].startswith("withheld") else f"{value} ({text})"


def format_ratio(entry: dict[str, typing.Any]) -> str:
    """Formats a ratio and its interval: `1.24, 1.20–1.28`."""
    if entry["low"] is None:
        return f"{entry['ratio']:.3f}, no interval"
    if statistics.is_wide(entry["low"], entry["high"]):
        return statistics.WIDE
    return f"{entry['ratio']:.3f}, {entry['low']:.3f}–{entry['high']:.3f}"


def _notes(group):
    """Notes on the rows, and reasons why values are not compared; each once."""
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
    caveat = "" if len(of) == 5 else f", {len(of)} of Eq. 12's five: not the study's score"
    return (
        f"Efficiency Score over the group {', '.join(over)} (mean of the ratios of {', '.join(of)}{caveat}): {scores}."
    )


def _noise(group):
    if not group["noise"]:
        return "Noise floor: unknown, no block holds the baseline twice."
    head = ["metric", "baseline / itself", "pairs", "smallest effect seen in 4 sweeps of 5", "blocks to see 3 %"]
    rows = []
    for key, noise in group["noise"].items():
        smallest = "–" if noise["smallest_effect"] is None else f"{noise['smallest_effect']:.1%}"
        rows.append([key, format_ratio(noise), noise["pairs"], smallest, noise["blocks_for_3_percent"]])
    return f"Noise floor, from the baseline against itself:\n\n{markdown_table(head, rows)}"


def _ranks(group, columns):
    units = {column["key"]: column for column in columns}
    rows = []
    for key in group["wins"]:
        if units[key]["better"]:
            ranked = [(v["cells"][key], v["variant"]) for v in group["variants"] if "rank" in v["cells"][key]]
            ranked.sort(key=lambda pair: pair[0]["rank"])
            order = ", ".join(f"{name} {c['rank']:g} ({c['rank_low']:g}–{c['rank_high']:g})" for c, name in ranked)
            rows.append([key, units[key]["better"], order])
    return rows and f"Ranks with 95 % intervals:\n\n{markdown_table(['metric', 'better', 'rank (interval)'], rows)}"


def _study(entry):
    head = ["variant", "metric", "study / its baseline", "here", ""]
    rows = [
        [
            row["variant"],
            row["metric"],
            f"{row['study_ratio']:.3f}",
            format_ratio(row) if "ratio" in row else f"– ({row['reason']})",
            row["agrees"],
        ]
        for row in entry["rows"]
    ]
    note = f" {entry['note']}." if entry["note"] else ""
    return f"Beside the study, table `{entry['table']}` ({entry['trust']}).{note}\n\n{markdown_table(head, rows)}"


def _grid(grid):
    head = ["variant", f"{grid['key']}", "held-out loss", "", "tries, wall time"]
    rows = []
    for variant, search in grid["variants"].items():
        seconds = sum(attempt["seconds"] or 0 for attempt in search["tries"])
        for attempt in search["tries"]:
            loss = "–" if attempt["eval_loss"] is None else f"{attempt['eval_loss']:.4f}"
            mark = "chosen" if attempt["value"] == search["chosen"] else attempt["outcome"]
            rows.append([literal(variant), attempt["value"], loss, mark, f"{len(search['tries'])}, {seconds:.0f} s"])
    return (
        f"## What sweep {grid['sweep']} chose before it compared\n\nThe value of the least held-out loss at the first "
        "seed, on the text that the rankings are scored on: losses are that much flattered, of every variant alike.\n\n"
        f"{markdown_table(head, rows)}"
    )


def _tested_first(claims):
    """The claims that these rows test; the others are folded."""
    tested = [claim for claim in claims if any("ratio" in pair for pair in claim["pairs"])]
    others = [claim for claim in claims if claim not in tested]
    folded = f"<details><summary>{len(others)} that cannot be tested here</summary>\n\n{_claims(others)}\n\n</details>"
    return "\n\n".join([*([_claims(tested)] if tested else []), *([folded] if others else [])])


def _claims(claims):
    rows = []
    for claim in claims:
        ratios = _ratios([pair for pair in claim["pairs"] if "ratio" in pair])
        condition = f"{claim['metric']} ratio {claim['ratio']}"
        rows.append(
            [
                claim["name"],
                f"{claim['says']} ({claim['where']})",
                condition,
                claim["status"],
                "; ".join(filter(None, (ratios or claim["reason"], claim["takes"] and f"to decide: {claim['takes']}"))),
            ]
        )
    return markdown_table(["claim", "says", "checked as", "here", "ratios, or why not"], rows)


def _ratios(pairs):
    """The ratios of pairs; of many their number, the least and the greatest."""
    if len(pairs) > _MOST_RATIOS:
        pairs = sorted(pairs, key=lambda pair: pair["ratio"])
        return f"{len(pairs)} pairs, from {_ratios(pairs[:1])} to {_ratios(pairs[-1:])}"
    return "; ".join(f"{pair['variant']} / {pair['against']} {format_ratio(pair)}" for pair in pairs)


def _left_out(board):
    lines = board.get("left_out") or []
    return lines and "## Left out\n\n" + "\n".join(f"- {line.removeprefix('left out: ')}" for line in lines)


def _failures(board):
    """Failed, running and stopped runs, each with its last line of output."""
    lines = [[f["variant"], f["block"], f["outcome"], f["path"], f["said"]] for f in board["failures"]]
    lines += [["?", "", run["state"], run["path"], run["said"]] for run in board["without_row"]]
    return lines and "## Failed and unfinished runs\n\n" + markdown_table(
        ["variant", "block", "outcome", "row", "said"], lines
    )
