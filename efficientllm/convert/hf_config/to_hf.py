"""Writes the config.json of one of our models for a family: the inverse of `families`.

The caller reads it back and compares (`canonical`), so a family that cannot express a model refuses it.
"""

import typing

from efficientllm.convert.hf_config import rope_parameters
from efficientllm.embeds.tokens import LM

_FURTHER = {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"}


def config_of(
    model_type: str, lm: LM, facts: dict[str, typing.Any], max_positions: int | None
) -> dict[str, typing.Any]:
    """A config.json (a dict) of `model_type` with the `facts` of `lm` that the family has keys for."""
    (mixer, _), *_ = facts["layers"]
    config: dict[str, typing.Any] = {
        "model_type": model_type,
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.dim,
        "num_hidden_layers": len(facts["layers"]),
        "tie_word_embeddings": lm.tied,
        # Without these keys the family's defaults apply, which may not be tokens of this vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if mixer["mixer"] in ("mamba", "mamba2"):
        return config | _state_space(mixer, facts)
    most = rope_parameters.named_positions(lm.position, max_positions)
    config |= {"max_position_embeddings": most, "num_attention_heads": mixer.get("num_heads")}
    config |= {
        "rope_parameters": rope_parameters.write_parameters(lm.position) if lm.position.startswith("rope(") else {}
    }
    if model_type == "gpt_neox" and config["rope_parameters"]:  # its class rotates a quarter of a head by default
        config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    if model_type == "phi3":  # it reads the key at the top level, and has a default for it
        original = config["rope_parameters"].get("original_max_position_embeddings", most)
        config["original_max_position_embeddings"] = original
    config["hidden_act"] = "gelu" if model_type == "gpt_neox" else "silu"
    config["layer_norm_eps" if model_type == "gpt_neox" else "rms_norm_eps"] = facts["norm"][1]["eps"]
    config |= _latent(mixer) if mixer["mixer"] == "mla" else _attention(model_type, mixer, facts)
    return config | _ffns(model_type, [ffn for _, ffn in facts["layers"]], facts)


def _attention(model_type, mixer, facts):
    if model_type == "gpt_neox":
        return {
            "attention_bias": mixer.get("qkv_bias"),
            "use_parallel_residual": facts["residual"] == "parallel",
        }
    config = {"num_key_value_heads": mixer.get("num_kv_heads"), "head_dim": mixer.get("head_dim")}
    if model_type in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = mixer.get("qkv_bias")
    if model_type == "qwen2_moe":
        config["qkv_bias"] = mixer.get("qkv_bias")
    return config | _windows(model_type, [mixer for mixer, _ in facts["layers"]])


def _windows(model_type, mixers):
    windows = [mixer.get("window") for mixer in mixers]
    widest = max((window for window in windows if window), default=None)
    if model_type in ("qwen2", "qwen3"):
        types = ["sliding_attention" if window else "full_attention" for window in windows]
        return {"use_sliding_window": bool(widest), "sliding_window": widest, "layer_types": types}
    if model_type == "qwen3_moe":
        return {"use_sliding_window": bool(widest), "sliding_window": widest}
    return {"sliding_window": widest} if model_type in ("mistral", "mixtral", "phi3") else {}


def _latent(mixer):
    _, position = mixer["position"]
    return {
        "num_key_value_heads": mixer["num_heads"],
        "kv_lora_rank": mixer["kv_rank"],
        "q_lora_rank": mixer["q_rank"],
        "qk_nope_head_dim": mixer["head_dim"],
        "qk_rope_head_dim": mixer["rope_dim"],
        "v_head_dim": mixer["v_dim"],
        "rope_interleave": position.get("interleaved", False),
    }


def _ffns(model_type, ffns, facts):
    dense = [ffn.get("hidden") for ffn in ffns if ffn["ffn"] != "moe"]
    experts = next((ffn for ffn in ffns if ffn["ffn"] == "moe"), None)
    config = {"intermediate_size": dense[0] if dense else 4 * facts["dim"]}
    if experts is None or model_type not in _FURTHER:
        return config
    if model_type == "mixtral":
        return {"intermediate_size": experts["hidden"]} | _counts(experts, "num_local_experts")
    config |= {"moe_intermediate_size": experts["hidden"], "norm_topk_prob": experts["normalise"]}
    if model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = experts["shared_hidden"]
    if model_type in ("qwen2_moe", "qwen3_moe"):
        sparse = [i for i, ffn in enumerate(ffns) if ffn["ffn"] != "moe"]
        return config | _counts(experts, "num_experts") | {"mlp_only_layers": sparse}
    config |= _counts(experts, "n_routed_experts") | {"routed_scaling_factor": experts["scale"]}
    config |= {"n_shared_experts": experts["shared_hidden"] // experts["hidden"], "n_group": experts["groups"]}
    config |= {"topk_group": experts["top_groups"], "first_k_dense_replace": len(dense)}
    if model_type == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy" if experts["groups"] > 1 else "greedy"
    return config


def _counts(experts, name):
    return {name: experts["num_experts"], "num_experts_per_tok": experts["top_k"]}


def _state_space(mixer, facts):
    config = {
        "expand": mixer["channels"] / facts["dim"],
        "state_size": mixer["state_dim"],
        "conv_kernel": mixer["conv"],
        "use_bias": mixer["use_bias"],
        "use_conv_bias": mixer["conv_bias"],
        "layer_norm_epsilon": facts["norm"][1]["eps"],
    }
    if config["expand"] == int(config["expand"]):
        config["expand"] = int(config["expand"])
    if mixer["mixer"] == "mamba":
        return config | {"time_step_rank": mixer["step_rank"], "intermediate_size": mixer["channels"]}
    heads = mixer["channels"] // mixer["width"]
    return config | {"head_dim": mixer["width"], "num_heads": heads, "n_groups": mixer["num_groups"]}
