"""Plans of the study's vision-language models, plans.csv: `python experiments/vision_language/plans.py [--only=REGEX]`.

Their tuning by seven methods on eight H200 at equal batch, pixels, text and targets, and a question about a picture of
1000 x 1000 on one H200 and on four. `--table` prints the README's tables of plans.csv instead. Finished plans are kept:
the same command resumes after a stop.
"""

import json
import math
import pathlib

from efficientllm.architecture import from_config
from efficientllm.convert.hf_config import families
from efficientllm.errors import exit_with
from efficientllm.registry.plugins import import_file
from efficientllm.report import study_tables
from efficientllm.vision.processors import read_processor

HERE = pathlib.Path(__file__).parent
plans_file = import_file(HERE.parent / "plan" / "plans_file.py")
planning, rounded = plans_file.planning, plans_file.rounded

MODELS = ("qwen2.5-vl-7b", "llava-1.5-7b", "internvl3-38b", "qvq-72b")
METHODS = ("lora", "lora_plus", "rslora", "dora", "pissa", "freeze", "full")
# The study's rank, alpha, dropout and ratio; targets are the linear layers of the language model.
OF_LORA = "rank=64, alpha=128, dropout=0.1"
ADAPTERS = {
    **{method: f"{method}({OF_LORA})" for method in ("lora", "rslora", "dora", "pissa")},
    "lora_plus": f"lora_plus({OF_LORA}, ratio=16)",
    "freeze": "freeze(last=2)",
    "full": "full()",
}
BATCH, TEXT = 32, 128  # rows of a step, each a picture and its tokens of text
CHART = (600, 800)  # a typical picture of ChartQA
PICTURE, QUESTION, ANSWER = (1000, 1000), 30, 32
FORMS = {"bfloat16": "bfloat16", "int4": "int4(group=128)"}
STUDY = "vlm_qwen2.5-vl-7b_chatqa"
STUDY_NAMES = {"lora_plus": "lora-plus"}
COLUMNS = (
    *("plan", "devices", "mesh", "source", "batch", "length", "image_tokens", "patches", "parameters", "trainable"),
    *("peak_gb", "fits", "fits_with", "weights_gb", "optimizer_gb", "gradients_gb", "activations_gb", "cache_gb"),
    *("kv_bytes_per_token", "images_tflop", "prefill_tflop", "model_tflop", "program_tflop", "moved_gb", "sent_gb"),
    *("compute_ms", "memory_ms", "network_ms", "least_ms", "ttft_ms", "tpot_ms", "bound"),
    *("study_amu_gb", "study_al_s", "kernels"),
)
HEADERS = {
    "image_tokens": "image tokens",
    "weights_gb": "weights, GB",
    "optimizer_gb": "optimizer",
    "gradients_gb": "gradients",
    "activations_gb": "activations",
    "peak_gb": "peak, GB",
    "program_tflop": "with remat",
    "model_tflop": "TFLOP",
    "least_ms": "least ms",
    "network_ms": "of them network",
    "study_amu_gb": "study's AMU, GB",
    "study_al_s": "study's AL, s",
    "images_tflop": "tower, TFLOP",
    "prefill_tflop": "prefill",
    "kv_bytes_per_token": "KV bytes a token",
    "ttft_ms": "least TTFT, ms",
    "tpot_ms": "a token, ms",
}


def folder(model):
    """The folder of a model's `config.json`."""
    return str(HERE / "models" / model)


def image_grids(model, picture):
    """Tiles, rows and columns of patches of a picture, and its tokens."""
    file = HERE / "models" / model / "config.json"
    described = families.describe_config(json.loads(file.read_text()), str(file))
    lm = from_config.from_config(from_config.complete_model(described.model))
    grids = read_processor(file.parent, lm).grid(*picture)
    return grids, math.prod(grids) // lm.vision.merge**2


def row_length(model, picture, text):
    """The tokens of a row with a picture, in whole blocks of 64."""
    return (image_grids(model, picture)[1] + text + 63) // 64 * 64


def list_plans():
    """`{plan: (config file, overrides)}`."""
    plans = {}
    for model in MODELS:
        for method in METHODS:
            plans[f"{model}/tune/{method}/h200_8"] = ("tune_vl.py:lora", tune(model, method))
        for form in FORMS:
            for devices in (1, 4):
                plans[f"{model}/infer/{form}/h200_{devices}"] = ("infer_vl.py:bfloat16", infer(model, form, devices))
    return plans


def shared(model, picture, devices):
    return {
        "model.pretrained": folder(model),
        "model.precision": "bfloat16",
        "plan.images": (picture,),
        "plan.hardware": "h200",
        "plan.devices": devices,
    }


def tune(model, method):
    """Every state divided over the eight devices, and activations recomputed, for all methods."""
    return shared(model, CHART, 8) | {
        "adapter": ADAPTERS[method],
        "model.embed": "tokens()",
        "model.remat": "full",
        "mesh": "fsdp=8",
        "train.batch_size": BATCH,
        "train.length": row_length(model, CHART, TEXT),
    }


def infer(model, form, devices):
    return shared(model, PICTURE, devices) | {
        "plan.of": "infer",
        "mesh": f"tensor={devices}" if devices > 1 else "data=1",
        "quant": FORMS[form],
        "infer.rules": () if form == "bfloat16" else (("^vision/", "bfloat16"),),
        "infer.prompt_length": image_grids(model, PICTURE)[1] + QUESTION + 2,
        "infer.max_new_tokens": ANSWER,
    }


def line(name, record):
    """What a row of plans.csv says of these models beside `plans_file.shared_values`."""
    plan, physical, config = record["predicted"], record["physical"], record["config"]
    model, kind, method, _ = name.split("/")
    serves = kind == "infer"
    grids, tokens = image_grids(model, PICTURE if serves else CHART)
    memory, programs = plan["memory_parts"], plan["parts"]
    size = {key: rounded(memory.get(key), 1e9) for key in memory}
    study = {}
    if model == "qwen2.5-vl-7b" and not serves:
        rows = {row["name"]: row for row in study_tables.read_tables()[STUDY]["rows"]}
        study = rows.get(STUDY_NAMES.get(method, method), {})
    return {
        "mesh": ", ".join(f"{axis} {shards}" for axis, shards in plan["mesh"].items() if shards > 1),
        "batch": 1 if serves else config["train"]["batch_size"],
        "length": config["infer"]["prompt_length"] if serves else config["train"]["length"],
        "image_tokens": tokens,
        "patches": math.prod(grids),
        "trainable": physical.get("params_trainable"),
        "fits_with": "; ".join(
            change["flags"].replace("--config.", "") for change in plan["changes"] if change["fits"]
        ),
        "weights_gb": size["weights"],
        "optimizer_gb": size.get("optimizer"),
        "gradients_gb": size.get("gradients"),
        "activations_gb": size.get("activations"),
        "cache_gb": size.get("states"),
        "kv_bytes_per_token": physical.get("kv_bytes_per_token"),
        "images_tflop": rounded(programs["images"]["model_flops"], 1e12) if serves else None,
        "prefill_tflop": rounded(sum(programs[part]["model_flops"] for part in ("prefill", "first logits")), 1e12)
        if serves
        else None,
        "ttft_ms": rounded(plan["ttft_s"], 1e-3) if serves else None,
        "tpot_ms": rounded(plan["tpot_s"], 1e-3) if serves else None,
        "study_amu_gb": study.get("amu_gb"),
        "study_al_s": study.get("al_s"),
    }


def format_tables(lines):
    """The README's tables of the rows of plans.csv."""
    tuned = (
        *(
            "trainable",
            "image_tokens",
            "weights_gb",
            "optimizer_gb",
            "gradients_gb",
            "activations_gb",
            "peak_gb",
            "fits",
        ),
        *("model_tflop", "program_tflop", "least_ms", "network_ms", "study_amu_gb", "study_al_s"),
    )
    served = (
        *("image_tokens", "weights_gb", "peak_gb", "fits", "images_tflop", "prefill_tflop", "kv_bytes_per_token"),
        *("ttft_ms", "tpot_ms"),
    )
    tables = {"Tuning on eight H200": ("/tune/", tuned), "A question about a picture on H200": ("/infer/", served)}
    return "\n\n".join(
        plans_file.format_table(title, columns, {name: row for name, row in lines.items() if pattern in name}, HEADERS)
        for title, (pattern, columns) in tables.items()
    )


FILE = plans_file.PlansFile(HERE / "plans.csv", list_plans(), COLUMNS, line, format_tables)


if __name__ == "__main__":
    exit_with(lambda: FILE.run(__doc__, "runs/vision_language_plans"))
