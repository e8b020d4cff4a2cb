"""Sampling from a trained diffusion model in a quantized form: --config=configs/infer_images.py:int8."""

from efficientllm import base_config

FORMS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8()",
    "int4": "int4()",
    "nf4": "nf4()",
}


def get_config(name="bfloat16"):
    config = base_config.get_config()
    config.name = f"infer_images_{name}"
    config.task = "infer"
    config.plan.of = "infer"
    config.model.pretrained = "runs/dit-mha"  # of configs/dit.py
    config.objective = "pretrained"
    config.data = "glyphs(size=32, channels=1)"
    config.quant = base_config.variant(FORMS, name)
    config.train.batch_size = 64  # rows of held-out pictures, for the quality readings
    config.eval.batches = 4
    config.infer.guidance = 2.0
    return config
