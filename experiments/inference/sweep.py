"""Inference at the study's sizes, 1.5B to 72B, in its quantized forms and int8, with random weights."""

from efficientllm.sweep import Sweep

SIZES = {"1.5b": True, "7b": False, "14b": False, "32b": False, "72b": False}  # whether the head is tied
FORMS = ("bfloat16", "float16", "int8", "int4")


def get_config():
    return Sweep(
        name="inference",
        baseline="1.5b_bfloat16",
        variants={
            f"{size}_{form}": (f"configs/infer.py:{form}", {"model.size": size, "model.tied": tied})
            for size, tied in SIZES.items()
            for form in FORMS
        },
        overrides={
            "model.pretrained": "",
            "model.precision": "bfloat16",
            "tokenizer": "bytes",
            "infer.chat": False,
            "infer.baseline": "",
            "infer.prompt_length": 512,
            "infer.max_new_tokens": 128,
        },
        equal={"tokens": 0.0},
    )
