"""Clips of prompts with Wan 2.1 in a quantized form: --config=configs/infer_video.py:int8.

`config.model.pretrained` is a pipeline of diffusers, a folder or a repository of the hub: transformer, text encoder,
tokenizer, autoencoder and scheduler come from it.
"""

from efficientllm.config.presets.infer_images import FORMS

from efficientllm import base_config


def get_config(name="bfloat16"):
    form = base_config.variant(FORMS, name)
    precision = "float32" if name == "float32" else "bfloat16"
    config = base_config.get_config()
    config.name = f"infer_video_{name}"
    config.task = "infer"
    config.plan.of = "infer"
    config.model.pretrained = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config.model.precision = precision
    config.objective = "pretrained"
    config.quant = form
    config.text_states = f"encoders(quant={form!r}, precision={precision!r})"
    config.infer.prompts = ("A red fox runs through the snow at dawn.",)
    config.infer.size = (81, 480, 832)
    config.infer.fps = 16.0
    config.infer.solver = "unipc(steps=50)"
    config.infer.guidance = 5.0
    config.sample.images = 1
    return config
