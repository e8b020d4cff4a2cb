"""Checkpoint folders written without torch: a config.json and tensors."""

import json

import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def shapes(config):
    """`{name on disk: shape}` of a Llama."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    K = D // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D)}
    layer |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    layer |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    names = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return names


def llama(folder, change=lambda tensors: None, **config):
    """Writes a random Llama whose tensors `change` may edit first; returns them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(LLAMA | config).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    return tensors


def adapter(folder, shapes, rank):
    """Writes a random adapter of peft's around weights `{name on disk: (out, in)}`; returns its tensors."""
    folder.mkdir(exist_ok=True)
    rng, tensors = np.random.default_rng(1), {}
    for name, (width_out, width_in) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, width_in), np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((width_out, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    return tensors
