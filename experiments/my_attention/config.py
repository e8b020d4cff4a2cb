"""The base model with gated attention, at the parameters of its baseline (configs/attention.py:gqa)."""

import os

from efficientllm import base_config


def get_config():
    config = base_config.get_config()
    config.name = "gated"
    config.imports = (os.path.relpath(os.path.join(os.path.dirname(__file__), "gated.py")),)
    config.model.mixer = "gated"
    config.model.parameters_of = "gqa | swiglu"
    return config
