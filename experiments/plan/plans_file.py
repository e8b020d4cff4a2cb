"""Plans of several configurations in one plans.csv: the command line, rows and tables that experiments share.

`--only=REGEX` plans those whose name it matches, `--out=DIR` is where their runs are, and `--table` prints the tables
of plans.csv instead. Finished plans are kept: the same command resumes after a stop.
"""

import argparse
import csv
import dataclasses
import json
import logging
import pathlib
import re
import typing
from collections.abc import Callable

from efficientllm.registry.plugins import import_file
from efficientllm.runtime.atomic_write import replacing
from efficientllm.runtime.stopping import stoppable
from efficientllm.typing import Record

planning = import_file(pathlib.Path(__file__).with_name("run.py"))

Row = dict[str, typing.Any]
Rows = dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class PlansFile:
    """A plans.csv.

    Args:
      file: its path.
      plans: `{name: (config file, overrides)}`.
      columns: the names of its columns.
      line: `(name, record of a plan) -> row`, of which `columns` are written.
      format_tables: `{name: row of the file} -> text` of the README's tables.
    """

    file: pathlib.Path
    plans: dict[str, tuple[str, Row]]
    columns: tuple[str, ...]
    line: Callable[[str, Record], Row]
    format_tables: Callable[[Rows], str]

    def row(self, name: str, record: Record) -> Row:
        """The row of a plan, by column."""
        values = shared_values(record) | self.line(name, record) | {"plan": name}
        return {key: values.get(key) for key in self.columns}

    def read(self) -> Rows:
        """`{plan: row of the file}`, empty before the first plan."""
        if not self.file.exists():
            return {}
        with open(self.file, newline="", encoding="utf-8") as lines:
            return {row["plan"]: row for row in csv.DictReader(lines)}

    def write(self, out: pathlib.Path) -> None:
        """Writes the file: plans below `out`, and for the others the rows that it already has."""
        lines = self.read() | {
            name: self.row(name, json.loads(file.read_text()))
            for name in self.plans
            if planning.is_planned(file := out / name / "record.json")
        }
        with replacing(self.file) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines[name] for name in self.plans if name in lines)

    def run(self, description: str, out: str) -> int:
        """Runs the command line; `out` is the default of `--out`. Returns 0, or 130 or 143 after a signal."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--only", default="", help="regular expression: plans whose name it matches")
        parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out))
        parser.add_argument("--table", action="store_true", help="print the tables of plans.csv, and plan nothing")
        options = parser.parse_args()
        if options.table:
            print(self.format_tables(self.read()))
            return 0
        return stoppable(lambda _: self._plan(options))()

    def _plan(self, options):
        logging.getLogger("jax").setLevel(logging.ERROR)
        try:
            # The most devices first: a process without the compiler cannot get more of them later.
            for name in sorted(self.plans, key=lambda name: -self.plans[name][1]["plan.devices"]):
                if re.search(options.only, name):
                    planning.make(name, *self.plans[name], options.out)
        finally:
            self.write(options.out)
        return 0


def shared_values(record: Record) -> Row:
    """What every plan says, by the columns' usual names: GB, TFLOP and ms."""
    plan, physical = record["predicted"], record["physical"]
    sent = plan["collectives"]
    limits = {f"{side}_ms": rounded(seconds, 1e-3) for side, seconds in plan["roofline_s"].items()}
    return limits | {
        "devices": f"{plan['devices']} x {plan['hardware']}",
        "source": plan["source"],
        "parameters": physical["params_total"],
        "peak_gb": rounded(plan["peak_bytes"], 1e9),
        "by_shapes_gb": rounded(plan["by_shapes_bytes"], 1e9),
        "fits": "yes" if plan["fits"] else "no",
        "model_tflop": rounded(plan["model_flops"], 1e12),
        "program_tflop": rounded(plan["program_flops"], 1e12),
        "moved_gb": rounded(plan["moved_bytes"], 1e9),
        "sent_gb": None if sent is None else rounded(sum(kind["wire_bytes"] for kind in sent.values()), 1e9),
        "least_ms": rounded(plan["step_s"], 1e-3),
        "bound": plan["bound"],
        "kernels": "; ".join(f"{key}: {', '.join(names)}" for key, names in plan["kernels"].items()),
    }


def rounded(value: float | None, unit: float, digits: int = 4) -> float | None:
    """A number in `unit`, to `digits` significant digits."""
    return None if value is None else float(f"{value / unit:.{digits}g}")


def format_table(title: str, columns: tuple[str, ...], lines: Rows, headers: dict[str, str]) -> str:
    """A titled table of rows of the file; `headers` are those of columns that are not called by their key."""
    rows = [[name, *(format_cell(row, key) for key in columns)] for name, row in lines.items()]
    return f"{title}:\n\n{table(['plan', *(headers.get(key, key) for key in columns)], rows)}"


def format_cell(row: dict[str, str], key: str) -> str:
    """A cell of `format_table`: words as they are, numbers to three digits."""
    value = row[key]
    if not value or key.startswith("fits"):
        return value
    if key == "trainable":
        return f"{int(value) / 1e6:,.1f}M"
    return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.3g}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
