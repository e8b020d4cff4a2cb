"""Plans of the study's diffusion transformers, plans.csv: `python experiments/dit/plans.py [--only=REGEX] [--out=DIR]`.

`--table` prints the README's tables of plans.csv instead. Finished plans are kept: the same command resumes after a
stop.
"""

import argparse
import csv
import json
import logging
import pathlib
import re

from efficientllm.errors import exit_with
from efficientllm.registry.plugins import import_file

HERE = pathlib.Path(__file__).parent
planning = import_file(HERE.parent / "plan" / "run.py")

VARIANTS = ("mha", "mqa", "gqa", "mla", "nsa", "moba", "moe")
# The size's name in the paper, and the rank of MLA's latent: an eighth of the width, as configs/dit_study.py has it.
SIZES = {"dit_xl2": ("XL/2", 144), "dit_l8": ("L/8", 128), "dit_b4": ("B/4", 96)}
# 48 does not divide the global batch of 256: a device has 5 or 6 of its pictures, and the step waits for those with 6.
MACHINES = {
    "h200": {"plan.hardware": "h200", "plan.devices": 8, "train.batch_size": 256},
    "gh200": {"plan.hardware": "gh200_96", "plan.devices": 48, "train.batch_size": 288},
}
PRECISION = {"model.precision": "bfloat16"}  # the study states none
GLOBAL_BATCH = 256  # of the study, in pictures
COLUMNS = (
    *("plan", "devices", "source", "batch", "parameters", "active", "gflop_per_image", "peak_gb", "by_shapes_gb"),
    *("fits", "model_tflop", "program_tflop", "moved_gb", "sent_gb", "compute_ms", "memory_ms", "network_ms"),
    *("launches_ms", "least_ms", "bound", "tt_at_most", "study_amu_gb", "study_al_ms", "study_tt", "kernels"),
)


def list_plans():
    """`{plan: (config file, overrides)}`."""
    return {
        f"{size}/{variant}/{machine}": (
            f"dit_study.py:{variant}",
            {**overrides, **PRECISION, "model.size": size}
            | ({"model.mixer": f"mla(kv_rank={rank}, rope_dim=0)"} if variant == "mla" else {}),
        )
        for size, (_, rank) in SIZES.items()
        for machine, overrides in MACHINES.items()
        for variant in VARIANTS
    }


def study_row(name):
    """The study's row of a plan, empty where it has none: its numbers are of XL/2 alone."""
    size, variant, _ = name.split("/")
    table = planning.study_tables.read_tables()["dit-xl-2_attention"]["rows"] if size == "dit_xl2" else ()
    return next((row for row in table if row["name"].partition("-")[0] == variant), {})


def line(name, record):
    """A row of plans.csv."""
    plan, physical, study = record["predicted"], record["physical"], study_row(name)
    sent = plan["collectives"]
    values = {
        "plan": name,
        "devices": f"{plan['devices']} x {plan['hardware']}",
        "source": plan["source"],
        "batch": record["config"]["train"]["batch_size"],
        "parameters": physical["params_total"],
        "active": physical["params_active"],
        "gflop_per_image": rounded(physical["flops_per_image"], 1e9),
        "peak_gb": rounded(plan["peak_bytes"], 1e9),
        "by_shapes_gb": rounded(plan["by_shapes_bytes"], 1e9),
        "fits": "yes" if plan["fits"] else "no",
        "model_tflop": rounded(plan["model_flops"], 1e12),
        "program_tflop": rounded(plan["program_flops"], 1e12),
        "moved_gb": rounded(plan["moved_bytes"], 1e9),
        "sent_gb": None if sent is None else rounded(sum(kind["wire_bytes"] for kind in sent.values()), 1e9),
        "least_ms": rounded(plan["step_s"], 1e-3),
        "bound": plan["bound"],
        "tt_at_most": GLOBAL_BATCH / plan["step_s"] / physical["params_active"],
        "study_amu_gb": study.get("amu_gb"),
        "study_al_ms": rounded(study.get("al_s"), 1e-3),
        "study_tt": study.get("tt_tokens_per_param_s"),
        "kernels": "; ".join(f"{key}: {', '.join(names)}" for key, names in plan["kernels"].items()),
    }
    limits = {f"{side}_ms": rounded(seconds, 1e-3) for side, seconds in plan["roofline_s"].items()}
    values["tt_at_most"] = float(f"{values['tt_at_most']:.4g}")
    return {key: values.get(key, limits.get(key)) for key in COLUMNS}


def rounded(value, unit, digits=4):
    return None if value is None else float(f"{value / unit:.{digits}g}")


def read_lines():
    """`{plan: row of plans.csv}`, empty before the first plan."""
    file = HERE / "plans.csv"
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8") as lines:
        return {row["plan"]: row for row in csv.DictReader(lines)}


def write_lines(out):
    """Writes plans.csv: plans below `out`, and for the others the rows that it already has."""
    lines = read_lines() | {
        name: line(name, json.loads(file.read_text()))
        for name in list_plans()
        if planning.is_planned(file := out / name / "record.json")
    }
    with open(HERE / "plans.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[name] for name in list_plans() if name in lines)


def format_size(size, lines):
    """A size's table: memory, least time and throughput on both machines, and the study's; empty where not planned."""
    header = ["variant", "parameters", "GFLOP a picture"]
    header += [f"{name}, {where}" for name in ("GB", "ms a step", "TT, 1e-6") for where in ("H200", "GH200", "study")]
    table = [header, ["---"] * len(header)]
    for variant in VARIANTS:
        rows = [lines.get(f"{size}/{variant}/{machine}") for machine in MACHINES]
        if any(rows):
            table.append([variant, *format_rows(rows)])
    return f"{SIZES[size][0]}:\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def format_rows(rows):
    """The cells of a variant; `rows` are its plans on the two machines, None where not planned."""
    first = next(filter(None, rows))
    total, active = (f"{int(first[key]) / 1e6:.1f}M" for key in ("parameters", "active"))
    cells = [total if total == active else f"{total}, {active} active", f"{float(first['gflop_per_image']):.4g}"]
    for planned, study, unit in (("peak_gb", "study_amu_gb", 1), ("least_ms", "study_al_ms", 1), RATES):
        cells += [format_figure(row, planned, unit) for row in rows]
        cells.append(f"{float(first[study]) * unit:.3g}" if first[study] else "")
    return cells


def format_figure(row, key, unit):
    """A planned figure, with `*` from shapes, `**` for a time from shapes without a network; no throughput of it."""
    if not row:
        return ""
    mark = "" if row["source"] == "compiler" else "*" if row["network_ms"] or key == "peak_gb" else "**"
    return "" if mark == "**" and key == "tt_at_most" else f"{float(row[key]) * unit:.3g}{mark}"


RATES = ("tt_at_most", "study_tt", 1e6)


def run():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression: plans whose name it matches")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/dit_plans"))
    parser.add_argument("--table", action="store_true", help="print the tables of plans.csv, and plan nothing")
    options = parser.parse_args()
    if options.table:
        print("\n\n".join(format_size(size, read_lines()) for size in SIZES))
        return
    logging.getLogger("jax").setLevel(logging.ERROR)
    plans = list_plans()
    # The most devices first: a process without the compiler cannot get more of them later.
    for name in sorted(plans, key=lambda name: -plans[name][1]["plan.devices"]):
        if re.search(options.only, name):
            planning.make(name, *plans[name], options.out)
    write_lines(options.out)


if __name__ == "__main__":
    exit_with(run)
