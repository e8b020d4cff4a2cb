"""Attention variants of one decoder: --config=configs/attention.py:mla. All have gqa's number of parameters."""

from efficientllm import base_config

# Blocks and windows fit rows of 128 tokens. The defaults of the specs are the papers', for longer rows:
# --config.model.mixer=nsa --config.train.length=8192
VARIANTS = {
    "mha": "mha",
    "mqa": "mqa",
    "gqa": "gqa",
    "mla": "mla",
    "nsa": "nsa(compress_block=8, compress_stride=4, select_block=16, select_count=4, window=32)",
    "window": "window(window=32)",
    "moba": "moba(block=16, block_count=3)",
}


def get_config(variant="gqa"):
    config = base_config.get_config()
    config.name = f"attention-{variant}"
    config.model.mixer = base_config.variant(VARIANTS, variant)
    config.model.parameters_of = "gqa | swiglu"
    return config
