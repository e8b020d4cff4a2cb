"""Plans of the study's configurations, and rows.csv: `python experiments/plan/run.py [--only=REGEX] [--out=DIR]`.

Finished plans are kept: the same command resumes after a stop.
"""

import argparse
import csv
import json
import logging
import pathlib
import re
import traceback

from efficientllm import main
from efficientllm.errors import exit_with
from efficientllm.report import study_tables
from efficientllm.runtime.atomic_write import replacing
from efficientllm.runtime.stopping import SIGNALS, stoppable

HERE = pathlib.Path(__file__).parent
# Folders with a config.json per model. Those of tuned models are beside the tuning experiment.
FOLDERS = (HERE.parent / "tuning" / "models", HERE / "models")
# One row of 8,192 tokens per device, parameters and optimizer state sharded over all devices, no rematerialization.
PRETRAIN = {
    "plan.hardware": "gh200_96",
    "plan.devices": 48,
    "train.batch_size": 48,
    "train.length": 8192,
    "model.precision": "bfloat16",
    "mesh": "fsdp=-1",
}
# The study's rank, dropout, precision and remat, and one batch for all methods: configs/tune_study.py.
TUNE = {"plan.hardware": "h200", "plan.devices": 8}
STOPPED = tuple(128 + signum for signum in SIGNALS)  # statuses of a command that a signal has stopped
METHODS = ("lora", "rslora", "lora_plus", "pissa", "dora", "freeze", "full")
# The same program as LoRA's with other constants and initial values: tests/plan/test_methods.py.
AS_LORA = re.compile(r"^(tune/.*)/(rslora|lora_plus|pissa)$")
TUNED = (
    *("llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen2.5-7b"),
    *("llama-3.1-8b", "qwen2.5-14b", "mistral-small-24b"),
)
# The request of the sweep experiments/inference: a prompt of 512 tokens and a completion of 128.
SERVE = {
    "plan.hardware": "gh200_96",
    "model.precision": "bfloat16",
    "infer.prompt_length": 512,
    "infer.max_new_tokens": 128,
}
# The study's distillation of DeepSeek at 14B has the shape of qwen2.5-14b.
SERVED = {
    "deepseek-r1-distill-qwen-1.5b": None,
    "qwen2.5-7b": None,
    "llama-3.1-8b": None,
    "qwen2.5-14b": "quantization_deepseek-r1-distill-qwen-14b",
    "phi-4": "quantization_phi-4",
    "qwen2.5-32b": "quantization_qwen2.5-32b",
    "yi-34b": "quantization_yi-34b",
}
FORMS = ("bfloat16", "float16", "int4")
MOE = "moe(num_experts=8, top_k=2, load_balance=0.01, z_loss=0.001)"
CAPACITY = MOE.replace("(", "(dispatch='capacity', capacity_factor=1.25, ")


def pretraining():
    """Pre-training plans: `{name: (config file, overrides, (the study's table, its row))}`."""
    plans = {}
    for size in ("1.5b", "0.5b", "3b"):
        # The width of 1.5b is divisible by 48. Those of 0.5b and 3b are not.
        overrides = {**PRETRAIN, "model.size": size, "mesh": "fsdp=-1" if size == "1.5b" else "data=3, fsdp=16"}
        for mixer in ("gqa", "mqa", "mla", "nsa", "mha"):
            # With the blocks of the paper instead of the config's, which fit short rows.
            change = {"model.mixer": "nsa"} if mixer == "nsa" else {}
            plans[f"attention/{size}/{mixer}"] = (f"attention.py:{mixer}", overrides | change, ("attention", mixer))
        for position in ("sinusoidal", "learned", "none", "relative"):
            change = {"model.position": "learned(max_length=8192)"} if position == "learned" else {}
            plans[f"position/{size}/{position}"] = (
                f"position.py:{position}",
                overrides | change,
                ("position", position),
            )
        for mixer in ("mamba", "pythia", "rwkv"):
            plans[f"attention_free/{size}/{mixer}"] = (f"mixers.py:{mixer}", overrides, ("attention_free", mixer))
        if size != "3b":
            # Neither 8 experts nor 0.5b's width of 896 are divisible by 48.
            for ending, mesh, ffn in (
                ("", "fsdp=-1", MOE),
                (", data=3, fsdp=16", "data=3, fsdp=16", MOE),
                (", expert=8, fsdp=6", "expert=8, fsdp=6", MOE),
                (", expert=8, fsdp=6, capacity 1.25", "expert=8, fsdp=6", CAPACITY),
            ):
                change = {"model.ffn": ffn, "mesh": mesh}
                plans[f"moe/{size}x8/top2{ending}"] = ("base.py", overrides | change, ("moe", f"moe-{size}x8-top2"))
    for model in ("llama-3-70b", "qwen2.5-72b"):
        overrides = PRETRAIN | {"model.pretrained": folder(model), "model.remat": "full"}
        for devices, mesh in ((48, "fsdp=-1"), (48, "data=3, fsdp=16"), (64, "fsdp=-1")):
            change = {"plan.devices": devices, "train.batch_size": devices, "mesh": mesh}
            plans[f"pretrain/{model}/{devices} by {mesh}"] = ("base.py", overrides | change, (None, None))
    return plans


def tuning():
    return {
        f"tune/{model}/{method}": (
            f"tune_study.py:{method}",
            TUNE | {"model.pretrained": folder(model)},
            (f"tune_{model}_o1-sft", method.replace("_", "-")),
        )
        for model in TUNED
        for method in METHODS
    }


def inference():
    """Serving plans: a request on one device, and on four devices by tensor parallelism."""
    plans = {}
    for kind, mesh in (("infer", {}), ("infer_by_four", {"plan.devices": 4, "mesh": "tensor=4"})):
        for model, table in SERVED.items():
            overrides = SERVE | mesh | {"model.pretrained": folder(model)}
            for form in FORMS:
                where = (None, None) if mesh else (table, form)
                plans[f"{kind}/{model}/{form}"] = (f"infer.py:{form}", overrides, where)
    return plans


def folder(model):
    """The folder with the model's config.json."""
    return next(str(parent / model) for parent in FOLDERS if (parent / model).is_dir())


def program_of(name):
    """The name of the plan that is computed for `name`: plans of the same program are computed once."""
    return AS_LORA.sub(r"\1/lora", name)


def make(name, config, overrides, out):
    """Plans one configuration into `out/name`. A failure is printed, written to error.txt and tried again next time.

    Raises SystemExit where a signal has stopped it, so that no further plan begins.
    """
    folder = out / name
    if is_planned(folder / "record.json"):
        return
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    try:
        status = main.main(
            [
                f"--config={HERE.parents[1] / 'configs' / config}",
                *("--config.task=plan", f"--config.name={name.replace('/', ' ')}", f"--workdir={folder}"),
                *flags,
            ]
        )
    except Exception:  # a configuration that cannot be compiled does not stop the others
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        print(f"{name}: {traceback.format_exc().splitlines()[-1]}")
        return
    if status in STOPPED:
        raise SystemExit(status)


def is_planned(file):
    """True for the row of a plan; one that failed leaves a row, too."""
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["outcome"] == "ok"


def study_values(where):
    """`(AMU in GB, AL in s)` of the study's row. None where the study has no number."""
    axis, row = where
    tables = study_tables.read_tables()
    table = tables.get(axis) or tables.get(f"{axis}_1.5b") or {"rows": ()}
    study_row = next((table_row for table_row in table["rows"] if table_row["name"] == row), {})
    return study_row.get("amu_gb"), study_row.get("al_s")


COLUMNS = (
    *("plan", "devices", "mesh", "parameters", "tokens", "arguments_gb", "temporaries_gb", "peak_gb", "fits"),
    *("fits_with", "by_shapes_gb", "model_tflop", "program_tflop", "moved_gb", "sent_gb", "compute_ms", "memory_ms"),
    *("network_ms", "launches_ms", "bound", "ttft_ms", "tpot_ms", "study_amu_gb", "study_al_ms", "compile_s"),
    "kernels",
)


def line(name, where, record):
    """A row of rows.csv."""
    plan, train = record["predicted"], record["config"]["train"]

    def size(key):
        return _round(plan["memory_bytes"].get(key), 1e9)

    request, phases = record["config"]["infer"], plan["parts"]
    tokens = f"{request['batch_size']} x {request['prompt_length']} and {request['max_new_tokens']} after"
    first_token_phases = (phases[key]["step_s"] for key in ("prefill", "first logits") if phases)
    sent = (
        None
        if plan["collectives"] is None
        else sum(collective["wire_bytes"] for collective in plan["collectives"].values())
    )
    limits = {f"{side}_ms": _round(seconds, 1e-3) for side, seconds in plan["roofline_s"].items()}
    amu, al = study_values(where) if "0.5b/" not in name and "3b/" not in name else (None, None)
    values = {
        "plan": name,
        "devices": f"{plan['devices']} x {plan['hardware']}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1),
        "parameters": record["physical"]["params_total"],
        "tokens": tokens if phases else f"{train['batch_size']} x {train['length']} a step",
        "arguments_gb": size("argument_bytes"),
        "temporaries_gb": size("temp_bytes"),
        "peak_gb": _round(plan["peak_bytes"], 1e9),
        "fits": "yes" if plan["fits"] else "no",
        "fits_with": "; ".join(
            collective["flags"].replace("--config.", "") for collective in plan["changes"] if collective["fits"]
        ),
        "by_shapes_gb": _round(plan["by_shapes_bytes"], 1e9),
        "model_tflop": _round(plan["model_flops"], 1e12),
        "program_tflop": _round(plan["program_flops"], 1e12),
        "moved_gb": _round(plan["moved_bytes"], 1e9),
        "sent_gb": _round(sent, 1e9),
        "bound": plan["bound"],
        "ttft_ms": _round(sum(first_token_phases), 1e-3) if phases else None,
        "tpot_ms": _round(phases["decode"]["step_s"], 1e-3) if phases else None,
        "study_amu_gb": amu,
        "study_al_ms": _round(al, 1e-3),
        "compile_s": _round(record["physical"]["compile_s"], 1),
        "kernels": "; ".join(f"{key}: {', '.join(kinds)}" for key, kinds in plan["kernels"].items()),
    }
    return {key: values.get(key, limits.get(key)) for key in COLUMNS}


def _round(value, unit, digits=4):
    return (
        None
        if value is None
        else float(f"{value / unit:.{digits}g}")
        if abs(value / unit) < 1000
        else round(value / unit)
    )


def table(plans, out):
    """Writes rows.csv: plans below `out`, and for the others the rows that it already has."""
    with open(HERE / "rows.csv", newline="", encoding="utf-8") as file:
        stored = {row["plan"]: row for row in csv.DictReader(file)}
    planned = {
        name: line(name, where, json.loads(file.read_text()))
        for name, (_, _, where) in plans.items()
        if is_planned(file := out / program_of(name) / "record.json")
    }
    lines = [(stored | planned)[name] for name in plans if name in stored | planned]
    with replacing(HERE / "rows.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def run():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression: plans whose name it matches")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/plan"))
    options = parser.parse_args()
    return stoppable(lambda _: plan_all(options.only, options.out))()


def plan_all(only, out):
    """Plans those whose name `only` matches, and writes rows.csv, after a stop too."""
    logging.getLogger("jax").setLevel(logging.ERROR)
    plans = pretraining() | tuning() | inference()
    try:
        for name in dict.fromkeys(program_of(name) for name in plans if re.search(only, name)):
            make(name, *plans[name][:2], out)
    finally:
        table(plans, out)
    return 0


if __name__ == "__main__":
    exit_with(run)
