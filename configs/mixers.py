"""Mamba, RWKV and Pythia variants: --config=configs/mixers.py:mamba. All have gqa's number of parameters."""

from efficientllm import base_config

VARIANTS = {
    # A block without an ffn is half a layer: a model of the same size has twice as many.
    "mamba": {"mixer": "mamba", "ffn": "none", "position": "none"},
    "mamba2": {"mixer": "mamba2(state_dim=64)", "ffn": "none", "position": "none"},
    "rwkv": {
        "mixer": "rwkv(head_dim=64)",
        "ffn": "channel_mix",
        "position": "none",
        "norm": "layernorm(eps=1e-5)",
        "embed_norm": True,
    },
    # GPT-NeoX (Biderman et al. 2023, arXiv:2304.01373)
    "pythia": {
        "mixer": "mha(qkv_bias=True, o_bias=True)",
        "ffn": "gelu",
        "position": "rope(fraction=0.25)",
        "norm": "layernorm(eps=1e-5)",
        "residual": "parallel",
        "tied": False,
    },
}


def get_config(variant="mamba"):
    config = base_config.get_config()
    config.name = variant
    config.model.update(base_config.variant(VARIANTS, variant))
    config.model.parameters_of = "gqa | swiglu"
    return config
