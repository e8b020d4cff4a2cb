"""Tiny random models of transformers, one or more per family, saved as folders, and the logits of both packages."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from efficientllm import model
from efficientllm.ops.attention import Context

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, LAYERS, LENGTH = 96, 2, 40
ATTENTION = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 500.0}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0], "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
STATE = {"hidden_size": 48, "state_size": 8, "expand": 2}
MAMBA2 = {"head_dim": 16, "num_heads": 6, "n_groups": 2, "chunk_size": 16}

# name -> (class, what of its config differs from the plain one of its kind)
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16, "rms_norm_eps": 1e-5}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}),
    "llama-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 500.0},
            "max_position_embeddings": 16,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE, "sliding_window": 30}),
    "phi3-plain": ("Phi3", {"num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 20}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "deepseek-v2": (
        "DeepseekV2",
        EXPERTS | LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        EXPERTS
        | LATENT
        | {"n_group": 2, "topk_group": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "gpt-neox": ("GPTNeoX", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "gpt-neox-sequential": (
        "GPTNeoX",
        {"hidden_size": 32, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "mamba": ("Mamba", STATE | {"time_step_rank": 5, "use_bias": True}),
    "mamba2": ("Mamba2", STATE | MAMBA2),
}


def reference(name, seed=0):
    """A random model of transformers; biases, norms and routers too are random."""
    kind, changes = FAMILIES[name]
    base = {} if kind.startswith("Mamba") else ATTENTION | {"rope_parameters": dict(ROPE)}
    base = {key: value for key, value in base.items() if kind != "GPTNeoX" or key != "num_key_value_heads"}
    config = getattr(transformers, f"{kind}Config")(
        **base | {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "pad_token_id": None} | changes
    )
    config._attn_implementation = config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    built = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in (*built.parameters(), *(b for n, b in built.named_buffers() if n.endswith("correction_bias"))):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return built.eval()


def tokens(seed=0, length=LENGTH):
    return np.random.default_rng(seed).integers(0, VOCAB, (2, length), np.int32)


def their_logits(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor(ids).long()).logits.float().numpy()


def our_logits(lm, params, ids):
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return np.asarray(jax.jit(lm.apply)({"params": params}, ids, Context.packed(positions))[0])


def abstract(lm):
    return nn.unbox(model.abstract_params(lm))


def close(actual, expected, tolerance):
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error}"
