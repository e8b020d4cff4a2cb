"""The report's files, all from one leaderboard."""

import csv
import io
import json

from efficientllm.report import comparison, curves, details, figures, markdown, page, techniques
from efficientllm.runtime.atomic_write import write_atomically


def write(board, rows, folder):
    """Writes `leaderboard.json`, `rows.csv`, `figures/`, `report.md` and `index.html` into `folder`."""
    found = curves.read_all(rows)
    write_atomically(folder / "leaderboard.json", json.dumps(board, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "rows.csv", rows_csv(rows, board["columns"]))
    names = figures.draw(board, found, folder / "figures")
    write_atomically(folder / "report.md", markdown.text(board, names))
    write_atomically(folder / "index.html", page.html(board, found, details.details(rows, folder)))


def rows_csv(rows, columns):
    """One line a run: what it is, its outcome, every metric with its unit in the heading; null is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    facts = ("path", "sweep", "variant", "baseline", "block", "order", "seed", "outcome", "task", "axis", "scale")
    metrics = [column["key"] for column in columns]
    heads = (_text(f"{c['key']} [{c['unit']}]") for c in columns)
    writer.writerow((*facts, "device", "batch", "starved", *heads))
    for row in rows:
        own = (row.path, row.sweep.get("name", ""), row.variant, row.baseline or "", row.block, row.order)
        own += (row.config.get("seed"), row.outcome, row.task, techniques.axis(row), row.config.get("model.size"))
        own += (comparison.device(row), comparison.batch(row), "" if row.starved is None else str(row.starved).lower())
        values = ("" if row.values.get(key) is None else repr(row.values[key]) for key in metrics)
        writer.writerow((*map(_text, own), *values))
    return text.getvalue()


def _text(value):
    """A cell that no spreadsheet takes for a formula; numbers stay numbers."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
