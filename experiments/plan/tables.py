"""Tables of the README from rows.csv: `python experiments/plan/tables.py`."""

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
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def trained(rows):
    """Formats the plans of pre-training, a line each."""
    lines = [[name, *(row[key] for key in TRAINED)] for name, row in rows.items() if name.split("/")[0] != "tune"]
    return markdown(["plan", *(key.replace("_", " ") for key in TRAINED)], lines)


def tuned(rows):
    """Formats the plans of tuning, a line per model: peak memory, the study's AMU in brackets, least step time."""

    def cell(row):
        if not row:
            return ""
        slowest_ms = max(float(row[f"{side}_ms"] or 0) for side in ("compute", "memory", "network"))
        study_peak = f" ({row['study_amu_gb']})" if row["study_amu_gb"] else ""
        return f"{row['peak_gb']}{study_peak}, {slowest_ms / 1e3:.3g} s"

    return by_model(rows, "tune", METHODS, cell)


def served(rows, kind):
    """Formats the plans of serving, a line per model: bytes of weights, peak (the study's AMU), time per token."""

    def cell(row):
        if not row:
            return ""
        study_peak = f" ({row['study_amu_gb']})" if row["study_amu_gb"] else ""
        return f"{row['arguments_gb']}, {row['peak_gb']}{study_peak}, {row['tpot_ms']} ms"

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
