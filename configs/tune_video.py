"""Tuning of a text-to-video model on clips with captions by one method: --config=configs/tune_video.py:lora.

`config.model.pretrained` is a pipeline of diffusers, a folder or a repository of the hub; captions go through its text
encoder, clips through its autoencoder, once. Clips of several sizes and lengths:
`videos(path=..., buckets=3, shorter=(5, 9))`. Clips, batches and evaluation are the same for every method; samples lie
beside those of the model before tuning.
"""

from efficientllm.config.presets.tune_image import ADAPTERS, FORMS, RATES

from efficientllm import base_config


def get_config(name="lora"):
    config = base_config.get_config()
    config.name = f"tune_video_{name}"
    config.task = "tune"
    config.plan.of = "tune"
    config.model.pretrained = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config.model.precision = "bfloat16"
    config.adapter = base_config.variant(ADAPTERS, name)
    config.quant = FORMS.get(name, "float32")
    config.objective = "pretrained"
    config.text_states = "encoders(precision='bfloat16')"
    config.data = "moving_glyphs(size=128, frames=17, style='^cm', held_out=0.2)"  # captions say letter and motion
    config.train.steps = 200
    config.train.batch_size = 8
    config.train.schedule = f"cosine(peak={RATES.get(name, 1e-3)}, warmup=0.1, final=0.1)"
    config.train.decay = ((".*", 0.0),)
    config.eval.every = 50
    config.eval.batches = 2
    config.checkpoint.every = 100
    config.sample.images = 4
    config.infer.guidance = 5.0
    return config
