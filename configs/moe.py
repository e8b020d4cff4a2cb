"""A sparse mixture of experts, 8 experts and 2 a token, on the Python documentation: the main job."""

from efficientllm import base_config


def get_config():
    config = base_config.get_config()
    config.name = "moe"
    config.model.ffn = "moe(num_experts=8, top_k=2, hidden=192, load_balance=0.01, z_loss=0.001)"
    return config
