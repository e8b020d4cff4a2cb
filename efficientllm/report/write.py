"""The report's files, all from one leaderboard."""

import csv
import io
import json

from efficientllm.report import comparison, curves, details, figures, markdown, page, techniques
from efficientllm.workdir import write_atomically


def write(board, rows, folder):
    """Writes `leaderboard.json`, `rows.csv`, `figures/`, `report.md` and `index.html` into `folder`."""
    found = {str(row.path): curves.read(row) for row in rows}
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
    writer.writerow((*facts, "device", "batch", *(f"{c['key']} [{c['unit']}]" for c in columns)))
    for row in rows:
        own = (row.path, row.sweep.get("name", ""), row.variant, row.baseline or "", row.block, row.order)
        own += (row.config.get("seed"), row.outcome, row.task, techniques.axis(row), row.config.get("model.size"))
        values = ("" if row.values.get(key) is None else repr(row.values[key]) for key in metrics)
        writer.writerow((*own, comparison.device(row), comparison.batch(row), *values))
    return text.getvalue()
