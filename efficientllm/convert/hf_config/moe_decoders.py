"""Mixture-of-experts families (Mixtral, Qwen MoE, DeepSeek): from config.json keys to `config.model`."""

import typing

from efficientllm.convert.hf_config import rope_parameters
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.hf_config.dense_decoders import decoder, shape_of, silu_only, spec_fields
from efficientllm.registry import format_spec


def mixtral(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    model = decoder(keys, max_positions, bias=(False, False))
    moe = {
        "num_experts": keys.number("num_local_experts", "num_experts"),
        "top_k": keys.number("num_experts_per_tok"),
        "hidden": spec_fields(model["size"])["hidden"],
    }
    return model | {"ffn": format_spec("moe", moe)}


def qwen2_moe(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    keys.expect("use_sliding_window", False, because="windows of some layers are not, in this family")
    for name in ("sliding_window", "max_window_layers"):
        keys.take(name, default=None)
    bias = keys.take("qkv_bias")
    model = decoder(keys, max_positions, bias=(bias, False), window=None)
    shared = {"shared_hidden": keys.number("shared_expert_intermediate_size"), "shared_gate": True}
    return _sparse_layers(keys, model, _qwen_experts(keys) | shared)


def qwen3_moe(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    on = keys.take("use_sliding_window", default=False)
    if not on:
        keys.take("sliding_window", default=None)
    keys.take("max_window_layers", default=None)
    keys.expect("use_qk_norm", True, because="queries and keys have norms in this family")
    keys.expect("shared_expert_intermediate_size", 0, because="this family has no shared expert")
    model = decoder(keys, max_positions, qk_norm=True, window="sliding_window" if on else None)
    return _sparse_layers(keys, model, _qwen_experts(keys))


def _qwen_experts(keys):
    return {
        "num_experts": keys.number("num_experts", "num_local_experts"),
        "top_k": keys.number("num_experts_per_tok"),
        "hidden": keys.number("moe_intermediate_size"),
        "normalise": bool(keys.take("norm_topk_prob")),
    }


def _sparse_layers(keys, model, moe):
    """Every decoder_sparse_step-th layer has experts, except those in mlp_only_layers."""
    step, dense = keys.take("decoder_sparse_step"), set(keys.take("mlp_only_layers", default=()))
    depth = spec_fields(model["size"])["num_layers"]
    sparse = [i not in dense and step > 0 and (i + 1) % step == 0 for i in range(depth)]
    return _dense_and_sparse(model, sparse, moe)


def _dense_and_sparse(model, sparse, moe):
    ffns = (format_spec("moe", moe) if is_sparse else "swiglu" for is_sparse in sparse)
    return model | {"pattern": tuple(f"{model['mixer']} | {ffn}" for ffn in ffns)}


def _deepseek(keys, max_positions, interleaved):
    """What DeepSeek V2 and V3 share: latent attention, and experts after the first dense layers."""
    keys.expect("attention_bias", False, because="mla has no bias here")
    keys.expect("mlp_bias", False, because="biases of its ffn are not converted")
    keys.expect("moe_layer_freq", 1, because="every layer after the dense ones has experts")
    silu_only(keys)
    keys.take("head_dim", default=None)  # repeats qk_rope_head_dim
    shape = shape_of(keys) | {"head_dim": keys.number("qk_nope_head_dim")}
    base, position_spec = rope_parameters.read_position(keys, max_positions, interleaved=interleaved)
    latent = {
        "kv_rank": keys.number("kv_lora_rank"),
        "q_rank": keys.number("q_lora_rank", default=None),
        "rope_dim": keys.number("qk_rope_head_dim"),
        "v_dim": keys.number("v_head_dim"),
    }
    width = shape["head_dim"] + latent["rope_dim"]
    keys.expect("qk_head_dim", width, because=f"qk_nope_head_dim and qk_rope_head_dim make {width}")
    model = {
        "size": format_spec("custom", shape | {"rope_base": base}),
        "mixer": format_spec("mla", {key: value for key, value in latent.items() if value}),
        "position": position_spec,
    }
    hidden = keys.number("moe_intermediate_size")
    moe = {
        "num_experts": keys.number("n_routed_experts", "num_local_experts", "num_experts"),
        "top_k": keys.number("num_experts_per_tok"),
        "hidden": hidden,
        "scale": float(keys.take("routed_scaling_factor")),
        "shared_hidden": hidden * keys.take("n_shared_experts", default=0),
    }
    first = keys.take("first_k_dense_replace", default=0)
    return model, [i >= first for i in range(shape["num_layers"])], moe


def _groups(keys):
    groups, chosen = keys.take("n_group", default=1), keys.take("topk_group", default=1)
    return {"groups": groups, "top_groups": chosen} if groups > 1 else {}


def deepseek_v2(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    keys.expect("rope_interleave", True, because="the class of this family always turns neighbours")
    model, sparse, moe = _deepseek(keys, max_positions, interleaved=True)
    method = keys.take("topk_method")
    groups = _groups(keys)
    if method not in ("greedy", "group_limited_greedy"):
        raise keys.refusal("topk_method", method, "known here: greedy, group_limited_greedy")
    keys.expect("scoring_func", "softmax", because="V2 routes by softmax")
    keys.expect("norm_topk_prob", False, because="transformers' DeepSeek-V2 does not normalise the experts' weights")
    limited = groups if method == "group_limited_greedy" else {}
    return _dense_and_sparse(model, sparse, moe | {"normalise": False} | limited)


def deepseek_v3(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    interleaved = keys.take("rope_interleave", default=False)
    model, sparse, moe = _deepseek(keys, max_positions, interleaved)
    keys.expect("topk_method", "noaux_tc", because="V3 routes by biased scores (noaux_tc)")
    keys.expect("scoring_func", "sigmoid", because="V3 routes by sigmoid")
    moe |= {"normalise": bool(keys.take("norm_topk_prob", default=False)), "scores": "sigmoid", "bias_rate": 0.001}
    return _dense_and_sparse(model, sparse, moe | _groups(keys))
