"""The README's tables, from rows.csv: `python experiments/plan/tables.py`."""

import argparse
import csv
import pathlib

from efficientllm.errors import exit_with

HERE = pathlib.Path(__file__).parent
TRAINED = ("peak_gb", "fits", "fits_with", "by_shapes_gb", "compute_ms", "memory_ms", "network_ms", "study_amu_gb")
METHODS = ("lora", "dora", "freeze", "full")
FORMS = ("bfloat16", "float16", "int4")


def markdown(header, lines):
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, each)) + " |" for each in cells)


def trained(rows):
    """A line for each step of pre-training."""
    lines = [[name, *(row[key] for key in TRAINED)] for name, row in rows.items() if name.split("/")[0] != "tune"]
    return markdown(["plan", *(key.replace("_", " ") for key in TRAINED)], lines)


def tuned(rows):
    """A line for each model: the peak of each method and its least time, and the study's AMU in brackets."""

    def cell(row):
        if not row:
            return ""
        least = max(float(row[f"{side}_ms"] or 0) for side in ("compute", "memory", "network"))
        known = f" ({row['study_amu_gb']})" if row["study_amu_gb"] else ""
        return f"{row['peak_gb']}{known}, {least / 1e3:.3g} s"

    return by_model(rows, "tune", METHODS, cell)


def served(rows, kind):
    """A line for each model: a device's weights in each form, its peak (the study's AMU), the least time of a token."""

    def cell(row):
        if not row:
            return ""
        known = f" ({row['study_amu_gb']})" if row["study_amu_gb"] else ""
        return f"{row['arguments_gb']}, {row['peak_gb']}{known}, {row['tpot_ms']} ms"

    return by_model(rows, kind, FORMS, cell)


def by_model(rows, kind, columns, cell):
    models = dict.fromkeys(name.split("/")[1] for name in rows if name.startswith(f"{kind}/"))
    lines = [[model, *(cell(rows.get(f"{kind}/{model}/{column}")) for column in columns)] for model in models]
    return markdown(["model", *columns], lines)


def run():
    argparse.ArgumentParser(description=__doc__).parse_args()
    with open(HERE / "rows.csv", newline="", encoding="utf-8") as file:
        rows = {row["plan"]: row for row in csv.DictReader(file)}
    training = {name: row for name, row in rows.items() if not name.startswith("infer")}
    print("\n\n".join((trained(training), tuned(rows), served(rows, "infer"), served(rows, "infer_by_four"))))


if __name__ == "__main__":
    exit_with(run)
