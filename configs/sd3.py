"""Stable Diffusion 3 and 3.5 on latents of 1024 pixels: --config=configs/sd3.py:sd35_medium, or `tiny`.

Weights are random unless --config.model.pretrained names a folder of diffusers, or of a single file. Plans and times
need none: --config.task=plan, --config.task=infer.
"""

from efficientllm import base_config
from efficientllm.convert.hf_config import sd3

VARIANTS = {
    "sd3_medium": {"layers": 24, "heads": 24, "qk_norm": False},
    "sd35_medium": {"layers": 24, "heads": 24, "dual": range(13), "table": 384},
    "sd35_large": {"layers": 38, "heads": 38},
    "tiny": {
        "layers": 3,
        "heads": 2,
        "head_dim": 16,
        "dual": (0,),
        "side": 8,
        "table": 12,
        "channels": 4,
        "text_length": 7,
        "text_dim": 24,
        "pooled_dim": 16,
    },
}


def get_config(variant="sd35_medium"):
    described = sd3.model(**base_config.variant(VARIANTS, variant))
    config = base_config.get_config()
    config.name = f"sd3-{variant}"
    config.objective = "flow(shift=3.0, label_dropout=0.0)"
    config.data = "images(path='pictures', size=1024)"
    config.model.update(described if variant == "tiny" else described | {"size": variant})
    config.infer.solver = "euler(steps=28, levels='sd3')"
    config.infer.guidance = 7.0
    return config
