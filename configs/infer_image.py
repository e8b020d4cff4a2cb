"""Pictures of prompts with Stable Diffusion 3 or 3.5 in a quantized form: --config=configs/infer_image.py:int8.

`config.model.pretrained` is a pipeline of diffusers, a folder or a repository of the hub: transformer, text encoders,
tokenizers, autoencoder and scheduler come from it.
"""

from efficientllm.config.presets.infer_images import FORMS

from efficientllm import base_config


def get_config(name="bfloat16"):
    form = base_config.variant(FORMS, name)
    precision = "float32" if name == "float32" else "bfloat16"
    config = base_config.get_config()
    config.name = f"infer_image_{name}"
    config.task = "infer"
    config.plan.of = "infer"
    config.model.pretrained = "stabilityai/stable-diffusion-3.5-medium"
    config.model.precision = precision
    config.objective = "pretrained"
    config.quant = form
    config.text_states = f"encoders(quant={form!r}, precision={precision!r})"
    config.infer.prompts = ("A red fox in the snow at dawn, photograph.",)
    config.infer.size = (1024, 1024)
    config.infer.solver = "euler(steps=28, levels='sd3')"
    config.infer.guidance = 7.0
    config.sample.images = 1
    return config
