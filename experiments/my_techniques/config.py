"""The base model with one technique of this folder, by file name: experiments/my_techniques/config.py:ffn."""

import os

from efficientllm import base_config

SERVED = {"task": "infer", "model.pretrained": "smollm2-135m", "tokenizer": "pretrained", "infer.chat": True}
PARTS = {
    "ffn": {"model.ffn": "relu2", "model.parameters_of": "gqa | swiglu"},
    "form": {**SERVED, "quant": "fp8"},
    "position": {"model.position": "kerple"},
    "optimizer": {"train.optimizer": "signum", "train.schedule": "wsd(peak=0.0003)"},
    "source": {"data": "sections(path='*.md')", "tokenizer": "characters", "train.length": 32},
    "sampler": {**SERVED, "infer.sampler": "top_n_sigma(n=1.0)"},
}


def get_config(part="ffn"):
    config, changes = base_config.get_config(), base_config.variant(PARTS, part)
    config.name = f"my_{part}"
    config.imports = (os.path.relpath(os.path.join(os.path.dirname(__file__), f"{part}.py")),)
    config.update_from_flattened_dict(changes)
    return config
