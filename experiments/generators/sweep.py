"""Five tuning methods of a text-to-image and of a text-to-video pipeline on a style: --config=.../sweep.py:NAME.

`sd3` and `wan` are the tiny pipelines of random weights that pipelines.py writes; `sd3.5-medium` and `wan2.1-1.3b` are
real ones, of the hub or of the folder in `--config.model.pretrained`.
"""

from efficientllm import base_config
from efficientllm.sweep import Sweep

METHODS = ("lora", "loha", "lokr", "glora", "full")
# The style is Computer Modern, in pictures and in clips; every fifth picture is held out.
TINY = {
    "train.steps": 60,
    "train.batch_size": 8,
    "eval.every": 0,
    "eval.batches": 4,
    "checkpoint.every": 60,
    "sample.images": 4,
}
REAL = {"model.precision": "bfloat16", "model.remat": "full", "train.batch_size": 8, "checkpoint.every": 200}
MODELS = {
    "sd3": ("image", TINY | {
        "model.pretrained": "runs/generators/sd3",
        "text_states": "encoders(length=16)",
        "data": "glyphs(size=32, style='^cm', held_out=0.2)",
        "infer.solver": "euler(steps=4)",
    }),
    "wan": ("video", TINY | {
        "model.pretrained": "runs/generators/wan",
        "model.precision": "float32",
        "text_states": "encoders(length=40)",
        "data": "moving_glyphs(size=32, frames=5, style='^cm', letters='ABCDEF', held_out=0.2)",
        "infer.solver": "unipc(steps=4)",
    }),
    "sd3.5-medium": ("image", REAL | {
        "model.pretrained": "stabilityai/stable-diffusion-3.5-medium",
        "text_states": "encoders(precision='bfloat16', quant='int8', truncate=True)",
        "data": "emoji(size=512, held_out=0.2)",
        "sample.images": 4,
        "infer.guidance": 4.5,
    }),
    "wan2.1-1.3b": ("video", REAL | {
        "model.pretrained": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "text_states": "encoders(precision='bfloat16', quant='int8')",
    }),
}  # fmt: skip


def get_config(name="sd3"):
    kind, overrides = base_config.variant(MODELS, name)
    return Sweep(
        name=f"generators_{name}",
        baseline="lora",
        variants={method: f"configs/tune_{kind}.py:{method}" for method in METHODS},
        equal={"tokens": 0.0},
        overrides=overrides,
        twice=False,
    )
