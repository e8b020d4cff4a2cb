"""Plans of the study's image and video models, plans.csv: `python experiments/generators/plans.py [--only=REGEX]`.

Their tuning by five methods on eight H200, their inference on one and on four, and what fits on 24 and on 80 GB.
`--table` prints the README's tables of plans.csv instead. Finished plans are kept: the same command resumes after a
stop.
"""

import functools
import pathlib
import re

import flax.linen as nn
from efficientllm.config.presets.tune_image import ADAPTERS

from efficientllm import model
from efficientllm.architecture import text_encoders
from efficientllm.config.plain import with_added_keys
from efficientllm.cost.hardware_table import find_hardware
from efficientllm.errors import exit_with
from efficientllm.quant import apply as quant
from efficientllm.registry.plugins import import_file
from efficientllm.weights import resident_bytes

HERE = pathlib.Path(__file__).parent
plans_file = import_file(HERE.parent / "plan" / "plans_file.py")
planning, rounded = plans_file.planning, plans_file.rounded

METHODS = ("lora", "loha", "lokr", "glora", "full")
# Weights are random: sizes, autoencoders' config.json and text encoders are the published ones.
# `batch` is that of configs/tune_image.py and configs/tune_video.py, over eight devices.
MODELS = {
    "sd35_medium": {
        "config": "sd3.py:sd35_medium",
        "autoencoder": f"kl(path={str(HERE / 'models' / 'sd3_vae')!r})",
        "encoders": ("clip_l", "clip_bigg", "t5_xxl"),
        "batch": 32,
    },
    "wan_1.3b": {
        "config": "wan.py:1.3b",
        "autoencoder": f"wan(path={str(HERE / 'models' / 'wan_vae')!r})",
        "encoders": ("umt5_xxl",),
        "batch": 8,
    },
}
PRECISION = {"model.precision": "bfloat16"}  # the study states none
REMAT = {"model.remat": "full"}
OFFLOAD = {"infer.offload": True}
# Of weights; nf4 is QLoRA's.
SMALLER = {"bfloat16": {"quant": "bfloat16"}, "nf4": {"quant": "nf4(block=64)"}}
FORMS = {"bfloat16": "bfloat16", "int8": "int8()", "int4": "int4()"}
CARD = "rtx4090"  # of 24 GB
COLUMNS = (
    *("plan", "devices", "mesh", "source", "batch", "weights", "remat", "offload", "parameters", "trainable", "tokens"),
    *("peak_gb", "fits", "fits_80", "fits_with", "weights_gb", "optimizer_gb", "gradients_gb", "activations_gb"),
    *("autoencoder_gb", "decoding_gb", "text_encoder_gb", "model_tflop", "program_tflop", "forward_tflop"),
    *("decode_tflop", "moved_gb", "sent_gb", "compute_ms", "memory_ms", "network_ms", "least_ms", "bound", "kernels"),
)

HEADERS = {
    "weights_gb": "weights, GB",
    "optimizer_gb": "optimizer",
    "gradients_gb": "gradients",
    "activations_gb": "activations",
    "autoencoder_gb": "autoencoder",
    "decoding_gb": "decoding",
    "peak_gb": "peak, GB",
    "text_encoder_gb": "text encoder before, GB",
    "model_tflop": "TFLOP",
    "program_tflop": "with remat",
    "forward_tflop": "TFLOP a forward",
    "decode_tflop": "a decode",
    "least_ms": "least ms",
    "network_ms": "of them network",
    "fits": "24 GB",
    "fits_80": "80 GB",
}


def list_plans():
    """`{plan: (config file, overrides)}`."""
    return {
        f"{size}/{name}": (of_size["config"], PRECISION | {"autoencoder": of_size["autoencoder"]} | overrides)
        for size, of_size in MODELS.items()
        for name, overrides in (
            tuning(of_size["batch"]) | video(size) | inference(size) | card(of_size["autoencoder"])
        ).items()
    }


def tuning(batch):
    """The study's methods on eight H200, every activation kept and none."""
    return {
        f"tune/{method}/h200_8{ending}": tune(method, "h200", 8, batch) | remat
        for method in METHODS
        for ending, remat in (("", {}), ("_remat", REMAT))
    }


def video(size):
    """Of clips alone: tokens divided over devices, and calls of the model as upstream, with the prompt or without."""
    if size != "wan_1.3b":
        return {}
    plans = {
        f"tune/lora/h200_8_sequence{shards}": tune("lora", "h200", 8, 8 // shards)
        | {"mesh": f"data={8 // shards}, sequence={shards}"}
        for shards in (2, 8)
    }
    for method in ("lora", "full"):
        divided = {"mesh": "sequence=8"} | REMAT
        plans[f"tune/{method}/h200_8_sequence8_remat"] = tune(method, "h200", 8, 1) | divided
    apart = infer("bfloat16", CARD) | OFFLOAD | {"infer.guidance": 1.0}
    return plans | {f"infer/bfloat16/{CARD}_1_offload_unguided": apart}


def inference(size):
    """A picture or clip of a prompt on one H200, and on four."""
    plans = {}
    for form in FORMS:
        plans[f"infer/{form}/h200_1"] = infer(form, "h200")
        plans[f"infer/{form}/h200_4_tensor"] = infer(form, "h200") | {"plan.devices": 4, "mesh": "tensor=4"}
    return plans


def card(autoencoder):
    """What makes it fit on a card of 24 GB: a picture or clip a device. The same bytes are compared with 80 GB."""
    plans = {
        f"tune/{method}/{CARD}_1{ending}": tune(method, CARD) | remat
        for method in ("lora", "full")
        for ending, remat in (("", {}), ("_remat", REMAT))
    }
    plans |= {f"tune/lora/{CARD}_1_remat_{name}": tune("lora", CARD) | REMAT | form for name, form in SMALLER.items()}
    plans[f"tune/lora/{CARD}_8_sequence"] = tune("lora", CARD, 8) | {"mesh": "sequence=8"}
    plans[f"tune/full/{CARD}_8_remat_fsdp"] = tune("full", CARD, 8, 8) | REMAT | {"mesh": "fsdp=8"}
    tiles = {"autoencoder": autoencoder.replace(")", ", tile=32)")}
    for ending, changes in (("", {}), ("_offload", OFFLOAD), ("_offload_tiles", OFFLOAD | tiles)):
        plans[f"infer/bfloat16/{CARD}_1{ending}"] = infer("bfloat16", CARD) | changes
    return plans


def tune(method, hardware, devices=1, batch=1):
    of_devices = {"plan.hardware": hardware, "plan.devices": devices, "train.batch_size": batch}
    return {"plan.of": "tune", "adapter": ADAPTERS[method]} | of_devices


def infer(form, hardware):
    return {"plan.of": "infer", "quant": FORMS[form], "plan.hardware": hardware, "plan.devices": 1}


@functools.cache
def encoder_bytes(size, form):
    """Bytes of the weights of the largest text encoder of a pipeline, in a form; they come one after another."""
    largest = [
        resident_bytes(quant.abstract(nn.unbox(model.abstract_params(text_encoders.build_published(name))), form))
        for name in MODELS[size]["encoders"]
    ]
    return max(largest)


def line(name, record):
    """What a row of plans.csv says of these models beside `plans_file.shared_values`."""
    plan, physical, config = record["predicted"], record["physical"], with_added_keys(record["config"])
    serves = config["plan"]["of"] == "infer"
    memory, programs = plan["memory_parts"], plan["parts"]
    size = {key: rounded(memory.get(key), 1e9) for key in memory}
    form = config["quant"] if serves else "bfloat16"
    # A solver step calls the model with and without the prompt, whose keys and values are computed once.
    calls = 1 if config["infer"]["guidance"] == 1 else 2
    forward = sum(programs[part]["model_flops"] for part in ("text", "step") if part in programs) / calls
    return {
        "mesh": ", ".join(f"{axis} {shards}" for axis, shards in plan["mesh"].items() if shards > 1),
        "batch": config["infer" if serves else "train"]["batch_size"],
        "weights": config["quant"],
        "remat": config["model"]["remat"],
        "offload": "yes" if config["infer"]["offload"] else "no",
        "trainable": physical.get("params_trainable"),
        "tokens": round(physical["flops_per_image"] / physical["flops_per_token"]),
        "fits_80": "yes" if plan["by_shapes_bytes"] <= find_hardware("h100")[1]["memory_bytes"] else "no",
        "fits_with": "; ".join(
            change["flags"].replace("--config.", "") for change in plan["changes"] if change["fits"]
        ),
        "weights_gb": size["weights"],
        "optimizer_gb": size.get("optimizer"),
        "gradients_gb": size.get("gradients"),
        "activations_gb": size.get("step" if serves else "activations"),
        "autoencoder_gb": size.get("autoencoder"),
        "decoding_gb": size.get("decoding"),
        "text_encoder_gb": rounded(encoder_bytes(name.split("/")[0], form), 1e9),
        "forward_tflop": rounded(forward, 1e12) if serves else None,
        "decode_tflop": rounded(programs["decode"]["model_flops"], 1e12) if serves else None,
    }


def format_tables(lines):
    """The README's tables of the rows of plans.csv."""
    parts = ["weights_gb", "optimizer_gb", "gradients_gb", "activations_gb", "peak_gb"]
    tuned = ("trainable", *parts, "model_tflop", "program_tflop", "least_ms", "network_ms")
    of_request = ("weights_gb", "activations_gb", "autoencoder_gb", "decoding_gb", "peak_gb", "text_encoder_gb")
    cost = ("forward_tflop", "decode_tflop", "model_tflop", "least_ms")
    tables = {
        "Tuning on eight H200": (r"/tune/\w+/h200_8(_remat)?$", tuned),
        "32,760 tokens divided over H200": (r"^wan.*/tune/(lora|full)/h200_8(_sequence\d)?(_remat)?$", tuned),
        "Inference on H200": (r"/infer/\w+/h200", of_request + cost),
        "Tuning on a card of 24 GB": (rf"/tune/\w+/{CARD}", (*parts, "fits", "fits_80")),
        "Inference on a card of 24 GB": (rf"/infer/\w+/{CARD}", (*of_request, "least_ms", "fits")),
    }
    return "\n\n".join(
        plans_file.format_table(
            title, columns, {name: row for name, row in lines.items() if re.search(pattern, name)}, HEADERS
        )
        for title, (pattern, columns) in tables.items()
    )


FILE = plans_file.PlansFile(HERE / "plans.csv", list_plans(), COLUMNS, line, format_tables)


if __name__ == "__main__":
    exit_with(lambda: FILE.run(__doc__, "runs/generators_plans"))
