"""Mixture of experts on the Python documentation: 8 experts, 2 per token."""

from efficientllm import base_config


def get_config():
    config = base_config.get_config()
    config.name = "moe"
    config.model.ffn = "moe(num_experts=8, top_k=2, hidden=192, load_balance=0.01, z_loss=0.001)"
    return config
