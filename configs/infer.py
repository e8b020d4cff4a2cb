"""Inference with a pretrained model in a quantized form: --config=configs/infer.py:int4."""

from efficientllm.config.presets.infer_images import FORMS as ROUNDED

from efficientllm import base_config

FORMS = {**ROUNDED, "stored": "stored"}  # as the files hold them


def get_config(name="bfloat16"):
    config = base_config.get_config()
    config.name = f"infer_{name}"
    config.task = "infer"
    config.plan.of = "infer"
    config.model.pretrained = "smollm2-135m"
    config.model.precision = "float32" if name == "float32" else "auto"
    config.quant = base_config.variant(FORMS, name)
    config.tokenizer = "pretrained"
    config.infer.chat = True
    config.train.batch_size = 1  # rows of held-out text, for the quality readings
    config.train.length = 256
    config.eval.batches = 8
    return config
