"""Plans the study's configurations and writes the table: `python experiments/plan/run.py [--only=REGEX] [--out=DIR]`.

Plans that are done stay done: the same command goes on where it was stopped.
"""

import argparse
import csv
import json
import logging
import pathlib
import re
import traceback

from efficientllm import main
from efficientllm.report import study

HERE = pathlib.Path(__file__).parent
# Published shapes (each model's own config.json); the vocabulary makes a tokenizer and a checkpoint unnecessary.
SHAPES = {
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 5e5, 128256, True),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18944, 1e6, 152064, False),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 5e5, 128256, False),
    "qwen2.5-14b": (48, 5120, 40, 8, 128, 13824, 1e6, 152064, False),
    "mistral-small-24b": (40, 5120, 32, 8, 128, 32768, 1e8, 131072, False),
    "llama-3-70b": (80, 8192, 64, 8, 128, 28672, 5e5, 128256, False),
    "qwen2.5-72b": (80, 8192, 64, 8, 128, 29568, 1e6, 152064, False),
}
FIELDS = ("num_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "hidden", "rope_base", "vocab_size")
# One row of 8,192 tokens a device, parameters and optimiser sharded over all devices, everything kept for the way back.
PRETRAIN = {
    "plan.hardware": "gh200_96",
    "plan.devices": 48,
    "train.batch_size": 48,
    "train.length": 8192,
    "model.precision": "bfloat16",
    "mesh": "fsdp=-1",
}
# One row of 4,096 tokens a device for every method; the study's own batches differ between methods.
TUNE = {
    "plan.hardware": "h200",
    "plan.devices": 8,
    "train.batch_size": 8,
    "train.length": 4096,
    "model.precision": "bfloat16",
    "model.remat": "full",
    "mesh": "fsdp=-1",
}
MOE = "moe(num_experts=8, top_k=2, load_balance=0.01, z_loss=0.001)"


def pretraining():
    """`{name: (config file, overrides, the study's table and row)}` of the axes of pre-training."""
    plans = {}
    for size in ("1.5b", "0.5b", "3b"):
        own = {**PRETRAIN, "model.size": size}
        for mixer in ("gqa", "mqa", "mla", "nsa", "mha"):
            # The paper's blocks rather than the demonstration's.
            change = {"model.mixer": "nsa"} if mixer == "nsa" else {}
            plans[f"attention/{size}/{mixer}"] = (f"attention.py:{mixer}", own | change, ("attention", mixer))
        for position in ("sinusoidal", "learned", "none", "relative"):
            change = {"model.position": "learned(max_length=8192)"} if position == "learned" else {}
            plans[f"position/{size}/{position}"] = (f"position.py:{position}", own | change, ("position", position))
        for mixer in ("mamba", "pythia", "rwkv"):
            plans[f"attention_free/{size}/{mixer}"] = (f"mixers.py:{mixer}", own, ("attention_free", mixer))
        if size != "3b":
            plans[f"moe/{size}x8/top2"] = ("base.py", own | {"model.ffn": MOE}, ("moe", f"moe-{size}x8-top2"))
    return plans


def tuning():
    plans = {}
    for model in SHAPES:
        own = TUNE | size_of(model)
        for method in ("lora", "qlora", "dora", "full"):
            plans[f"tune/{model}/{method}"] = (f"tune.py:{method}", own, (f"tune_{model}_o1-sft", method))
    for model in ("llama-3-70b", "qwen2.5-72b"):
        own = PRETRAIN | size_of(model) | {"model.remat": "full"}
        plans[f"pretrain/{model}/gqa"] = ("base.py", own, (None, None))
    return plans


def size_of(model):
    *shape, tied = SHAPES[model]
    spec = ", ".join(f"{key}={value!r}" for key, value in zip(FIELDS, shape, strict=True))
    return {"model.size": f"custom({spec}, qkv_bias={model.startswith('qwen')})", "model.tied": tied}


def make(name, config, overrides, out):
    """Plans one configuration into `out/name`; what fails is said and left for the next time."""
    folder = out / name
    if (folder / "record.json").exists():
        return
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    try:
        main.main(
            [f"--config={HERE.parents[1] / 'configs' / config}", "--config.task=plan", f"--workdir={folder}", *flags]
        )
    except Exception:  # one configuration that the compiler cannot take does not stop the others
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        print(f"{name}: {traceback.format_exc().splitlines()[-1]}")


def studied(where):
    """(AMU in GB, AL in s) of the study's row, None where it has none."""
    axis, row = where
    tables = study.tables()
    table = tables.get(axis) or tables.get(f"{axis}_1.5b") or {"rows": ()}
    found = next((each for each in table["rows"] if each["name"] == row), {})
    return found.get("amu_gb"), found.get("al_s")


COLUMNS = (
    *("plan", "devices", "mesh", "parameters", "tokens_a_step", "arguments_gb", "temporaries_gb", "peak_gb", "fits"),
    *("fits_with", "by_shapes_gb", "model_tflop", "program_tflop", "moved_gb", "sent_gb", "compute_ms", "memory_ms"),
    *("network_ms", "bound", "study_amu_gb", "study_al_ms", "compile_s", "kernels"),
)


def line(name, where, record):
    """A plan's line of the table."""
    plan, train = record["predicted"], record["config"]["train"]
    size = lambda key: _round(plan["memory_bytes"].get(key), 1e9)  # noqa: E731
    sent = None if plan["collectives"] is None else sum(each["wire_bytes"] for each in plan["collectives"].values())
    sides = {f"{side}_ms": _round(seconds, 1e-3) for side, seconds in plan["roofline_s"].items()}
    amu, al = studied(where) if "0.5b/" not in name and "3b/" not in name else (None, None)
    values = {
        "plan": name,
        "devices": f"{plan['devices']} x {plan['hardware']}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1),
        "parameters": record["physical"]["params_total"],
        "tokens_a_step": f"{train['batch_size']} x {train['length']}",
        "arguments_gb": size("argument_bytes"),
        "temporaries_gb": size("temp_bytes"),
        "peak_gb": _round(plan["peak_bytes"], 1e9),
        "fits": "yes" if plan["fits"] else "no",
        "fits_with": "; ".join(each["flags"].replace("--config.", "") for each in plan["changes"] if each["fits"]),
        "by_shapes_gb": _round(plan["by_shapes_bytes"], 1e9),
        "model_tflop": _round(plan["model_flops"], 1e12),
        "program_tflop": _round(plan["program_flops"], 1e12),
        "moved_gb": _round(plan["moved_bytes"], 1e9),
        "sent_gb": _round(sent, 1e9),
        "bound": plan["bound"],
        "study_amu_gb": amu,
        "study_al_ms": _round(al, 1e-3),
        "compile_s": _round(record["physical"]["compile_s"], 1),
        "kernels": "; ".join(f"{key}: {', '.join(kinds)}" for key, kinds in plan["kernels"].items()),
    }
    return {key: values.get(key, sides.get(key)) for key in COLUMNS}


def _round(value, unit, digits=4):
    return (
        None
        if value is None
        else float(f"{value / unit:.{digits}g}")
        if abs(value / unit) < 1000
        else round(value / unit)
    )


def table(plans, out):
    """The lines of all plans that are there, as rows.csv."""
    lines = [
        line(name, where, json.loads((out / name / "record.json").read_text()))
        for name, (_, _, where) in plans.items()
        if (out / name / "record.json").exists()
    ]
    with open(HERE / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    shown = (
        "plan",
        "peak_gb",
        "fits",
        "fits_with",
        "by_shapes_gb",
        "compute_ms",
        "memory_ms",
        "network_ms",
        "study_amu_gb",
        "study_al_ms",
    )
    print("| " + " | ".join(shown) + " |\n|" + "---|" * len(shown))
    for each in lines:
        print("| " + " | ".join("" if each[key] is None else str(each[key]) for key in shown) + " |")


def run():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plans whose name this regular expression finds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/plan"))
    options = parser.parse_args()
    logging.getLogger("jax").setLevel(logging.ERROR)
    plans = pretraining() | tuning()
    for name, (config, overrides, _) in plans.items():
        if re.search(options.only, name):
            make(name, config, overrides, options.out)
    table(plans, options.out)


if __name__ == "__main__":
    run()
