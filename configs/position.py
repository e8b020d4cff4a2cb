"""Position encodings of one decoder: --config=configs/position.py:alibi. All have equal parameters."""

from efficientllm import base_config

VARIANTS = {
    "rope": "rope",
    "sinusoidal": "sinusoidal",
    "learned": "learned(max_length=1024)",
    "relative": "relative",
    "t5": "t5",
    "alibi": "alibi",
    "none": "none",
}


def get_config(variant="rope"):
    config = base_config.get_config()
    config.name = f"position-{variant}"
    config.model.position = base_config.variant(VARIANTS, variant)
    config.model.parameters_of = "gqa | swiglu"
    return config
