"""Writes the files of a report: JSON, CSV, figures, Markdown and the page."""

import csv
import io
import json
import pathlib
import typing
from collections.abc import Sequence

from efficientllm.report import (
    claim_figures,
    curves,
    details,
    figures,
    groups,
    markdown,
    page,
    rerun_command,
    sampled_pictures,
    techniques,
)
from efficientllm.report.rows import Row
from efficientllm.runtime.atomic_write import write_atomically


def write_report(board: dict[str, typing.Any], rows: Sequence[Row], folder: pathlib.Path) -> None:
    """Writes `leaderboard.json`, `rows.csv`, `figures/`, `report.md` and `index.html` into `folder`."""
    run_curves = curves.read_all_curves(rows)
    write_atomically(folder / "leaderboard.json", json.dumps(board, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "rows.csv", rows_csv(rows, board["columns"]))
    figure_files = figures.draw_figures(board, run_curves, folder / "figures", rows)
    drawn_claims = {c["name"]: svg for c in board["claims"] if (svg := claim_figures.draw_claim(c))}
    for name, svg in drawn_claims.items():
        write_atomically(folder / "figures" / f"claim_{name}.svg", svg)
    write_atomically(folder / "report.md", markdown.markdown_report(board, figure_files, drawn_claims))
    run_details, pictures = details.run_details(rows, folder), sampled_pictures.embed_pictures(rows)
    text = page.page_html(board, run_curves, run_details, pictures, drawn_claims)
    write_atomically(folder / "index.html", text)


def rows_csv(rows: Sequence[Row], columns: Sequence[dict]) -> str:
    """CSV with a line per run: its facts, its outcome, and every metric; null is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    facts = ("path", "sweep", "variant", "baseline", "block", "order", "seed", "outcome", "task", "axis", "scale")
    metrics = [column["key"] for column in columns]
    heads = (_text(f"{c['key']} [{c['unit']}]") for c in columns)
    writer.writerow((*facts, "device", "batch", "starved", *_ORIGIN, *heads))
    for row in rows:
        cells = [row.path, row.sweep.get("name", ""), row.variant, row.baseline or "", row.block, row.order]
        cells += [row.config.get("seed"), row.outcome, row.task, techniques.study_axis(row)]
        cells += [row.config.get("model.size"), groups.device(row), groups.batch(row)]
        cells.append("" if row.starved is None else str(row.starved).lower())
        cells += _origin(row)
        values = ("" if row.values.get(key) is None else repr(row.values[key]) for key in metrics)
        writer.writerow((*map(_text, cells), *values))
    return text.getvalue()


_ORIGIN = ("measures", "commit", "started", "ended", "command")


def _origin(row):
    """What the sweep measures, where a row comes from, and the command that runs it again."""
    provenance = row.record["provenance"]
    commit = (provenance.get("git") or {}).get("commit")
    times = [provenance.get(key) for key in ("started", "ended")]
    return [row.sweep.get("measures"), commit, *times, rerun_command.rerun_command(row)]


def _text(value):
    """Quotes a cell that a spreadsheet would take for a formula; numbers stay numbers."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
