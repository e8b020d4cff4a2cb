"""Tuning of a diffusion model on a style by one method: --config=configs/tune_image.py:lora.

`config.model.pretrained` is what is tuned: the folder of a run of configs/dit.py, one of diffusers, or a hub id. One
that reads texts learns from captions: `--config.text_states='encoders()' --config.data='emoji(size=512)'`, say.
Pictures of several sizes: `images(path=..., size=512, buckets=7)`.
Pictures, batches and evaluation are the same for every method; samples lie beside those of the model before tuning.
"""

from efficientllm import base_config

ADAPTERS = {
    "lora": "lora(rank=16, alpha=16)",
    "rslora": "rslora(rank=16, alpha=16)",
    "dora": "dora(rank=16, alpha=16)",
    "pissa": "pissa(rank=16, alpha=16)",
    "qlora": "lora(rank=16, alpha=16)",
    "loha": "loha(rank=16, alpha=16)",
    "lokr": "lokr(rank=16, alpha=16)",
    "glora": "glora(rank=16)",
    "freeze": "freeze(last=1)",
    "full": "full()",
}
FORMS = {"qlora": "nf4(block=64)"}  # of the frozen kernels
# Pretrained weights that are trained themselves need smaller steps than adapters.
RATES = {"full": 2e-4, "freeze": 2e-4, "glora": 2e-4}


def get_config(name="lora"):
    config = base_config.get_config()
    config.name = f"tune_image_{name}"
    config.task = "tune"
    config.plan.of = "tune"
    config.adapter = base_config.variant(ADAPTERS, name)
    config.quant = FORMS.get(name, "float32")
    config.objective = "pretrained"
    config.data = "glyphs(size=32, channels=1, style='^cm', held_out=0.2)"  # Computer Modern; a letter is a class
    config.train.steps = 200
    config.train.batch_size = 32
    config.train.schedule = f"cosine(peak={RATES.get(name, 1e-3)}, warmup=0.1, final=0.1)"
    config.train.decay = ((".*", 0.0),)
    config.eval.every = 50
    config.eval.batches = 4
    config.checkpoint.every = 100
    config.infer.guidance = 2.0
    return config
