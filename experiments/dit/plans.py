"""Plans of the study's diffusion transformers, plans.csv: `python experiments/dit/plans.py [--only=REGEX] [--out=DIR]`.

`--table` prints the README's tables of plans.csv instead. Finished plans are kept: the same command resumes after a
stop.
"""

import pathlib

from efficientllm.errors import exit_with
from efficientllm.registry.plugins import import_file

HERE = pathlib.Path(__file__).parent
plans_file = import_file(HERE.parent / "plan" / "plans_file.py")
planning, rounded = plans_file.planning, plans_file.rounded

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
    """What a row of plans.csv says of these models beside `plans_file.shared_values`."""
    plan, physical, study = record["predicted"], record["physical"], study_row(name)
    return {
        "batch": record["config"]["train"]["batch_size"],
        "active": physical["params_active"],
        "gflop_per_image": rounded(physical["flops_per_image"], 1e9),
        "tt_at_most": rounded(GLOBAL_BATCH / plan["step_s"] / physical["params_active"], 1),
        "study_amu_gb": study.get("amu_gb"),
        "study_al_ms": rounded(study.get("al_s"), 1e-3),
        "study_tt": study.get("tt_tokens_per_param_s"),
    }


def format_tables(lines):
    return "\n\n".join(format_size(size, lines) for size in SIZES)


def format_size(size, lines):
    """A size's table: memory, least time and throughput on both machines, and the study's; empty where not planned."""
    header = ["variant", "parameters", "GFLOP a picture"]
    header += [f"{name}, {where}" for name in ("GB", "ms a step", "TT, 1e-6") for where in ("H200", "GH200", "study")]
    planned = {variant: [lines.get(f"{size}/{variant}/{machine}") for machine in MACHINES] for variant in VARIANTS}
    rows = [[variant, *format_rows(pair)] for variant, pair in planned.items() if any(pair)]
    return f"{SIZES[size][0]}:\n\n{plans_file.table(header, rows)}"


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


FILE = plans_file.PlansFile(HERE / "plans.csv", list_plans(), COLUMNS, line, format_tables)


if __name__ == "__main__":
    exit_with(lambda: FILE.run(__doc__, "runs/dit_plans"))
