"""Sampling of letters from a run of configs/dit.py: five forms of the weights, 1, 4 and 16 pictures at a time."""

from efficientllm.sweep import Sweep

FORMS = ("float32", "bfloat16", "float16", "int8", "int4")
BATCHES = (1, 4, 16)


def get_config():
    return Sweep(
        name="dit_serving",
        baseline="float32_16",
        variants={
            f"{form}_{rows}": (f"configs/infer_images.py:{form}", {"infer.batch_size": rows})
            for form in FORMS
            for rows in BATCHES
        },
        overrides={"infer.solver": "euler(steps=28)", "sample.images": 16},
        equal={"parameters": 0.0},
        twice=False,
    )
