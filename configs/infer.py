"""Inference with a pretrained model in a quantized form: --config=configs/infer.py:int4."""

from efficientllm import base_config

FORMS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8()",
    "int4": "int4()",
    "nf4": "nf4()",
    "stored": "stored",
}


def get_config(name="bfloat16"):
    config = base_config.get_config()
    config.name = f"infer_{name}"
    config.task = "infer"
    config.plan.of = "infer"
    config.model.pretrained = "smollm2-135m"
    config.quant = base_config.variant(FORMS, name)
    config.tokenizer = "pretrained"
    config.infer.chat = True
    config.train.batch_size = 1  # rows of held-out text, for the quality readings
    config.train.length = 256
    config.eval.batches = 8
    return config
