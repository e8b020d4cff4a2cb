"""Types and ranges of a config.json's values, checked before anything is computed from them.

A million layers, a width of 10^30 or a list in place of a number fails at once with one line, for every family.
`families` gives the keys their meaning.
"""

import math
import os
import typing

from efficientllm.errors import UserError, short_repr

LAYERS, WIDTH, VOCABULARY, POSITIONS, EXPERTS = 2048, 1 << 20, 1 << 25, 1 << 31, 1 << 14
EXPERTS_IN_ALL = 1 << 18  # over all layers; each has its own tensors
LONGEST = 1 << 16  # entries of a list
_ANY = 1e18  # bound of numbers without a known range

# Whole numbers: key -> largest value; the least is 0, and `families` refuses a 0 that cannot be.
# fmt: off
_WHOLE = {
    "num_hidden_layers": LAYERS, "max_window_layers": LAYERS, "first_k_dense_replace": LAYERS,
    "decoder_sparse_step": LAYERS, "moe_layer_freq": LAYERS, "num_layers": LAYERS, "depth": LAYERS,
    "num_decoder_layers": LAYERS, "rope_max_seq_len": 1 << 17, "image_token_id": VOCABULARY,
    "image_token_index": VOCABULARY,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "original_max_position_embeddings": POSITIONS,
    "sliding_window": POSITIONS, "chunk_size": POSITIONS,
    **dict.fromkeys((
        "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
        "topk_group",
    ), EXPERTS),
    **dict.fromkeys((
        "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim",
        "num_attention_heads", "num_key_value_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "state_size", "conv_kernel", "num_heads", "n_groups",
        "attention_head_dim", "in_channels", "out_channels", "sample_size", "input_size", "patch_size",
        "num_embeds_ada_norm", "num_classes", "d_model", "d_kv", "d_ff", "projection_dim",
        "relative_attention_num_buckets", "relative_attention_max_distance", "text_dim", "ffn_dim", "freq_dim",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
        "embed_dim", "out_hidden_size", "window_size", "spatial_merge_size", "temporal_patch_size", "num_channels",
        "image_size",
    ), WIDTH),
}
_LISTED = frozenset({"patch_size", "image_size"})  # of the whole numbers: a list of them, too
# Numbers: key -> (least, largest).
_NUMBERS = {
    "rope_theta": (1e-3, 1e15), "rotary_emb_base": (1e-3, 1e15), "factor": (1e-3, 1e6),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "eps"), (0, 1)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (0, 1)),
    **dict.fromkeys((
        "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "expand", "routed_scaling_factor", "mlp_ratio",
    ), (0, 1e6)),
}
_TEXTS = frozenset({
    "model_type", "_class_name", "activation_fn", "norm_type", "hidden_act", "rope_type", "type", "topk_method",
    "scoring_func", "feed_forward_proj", "dense_act_fn", "qk_norm",
})
_FLAGS = frozenset({
    "tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_conv_bias", "norm_topk_prob",
    "use_sliding_window", "use_parallel_residual", "rope_interleave", "is_encoder_decoder", "norm_before_gate",
    "learn_sigma", "norm_elementwise_affine", "is_gated_act", "cross_attn_norm", "use_qk_norm", "use_mean_pooling",
    "qk_normalization",
    "multimodal_projector_bias",
})
_LISTS = {
    "architectures": str, "layer_types": str, "mlp_only_layers": int, "short_factor": float, "long_factor": float,
    "time_step_limit": None, "dual_attention_layers": int,
    "fullatt_block_indexes": int,
}
# fmt: on


def check_values(config: dict[str, typing.Any], where: str | os.PathLike[str]) -> None:
    """Raises UserError, beginning with `where`, naming the first key with a value of a wrong type or range."""
    for key, value in config.items():
        _check(where, key, value)
    for key in ("rope_scaling", "rope_parameters"):
        inner = config.get(key)
        if isinstance(inner, dict):
            for name, value in inner.items():
                _check(where, name, value, f"{key}.")
    for key in ("text_config", "vision_config", "llm_config"):
        if isinstance(inner := config.get(key), dict):
            check_values(inner, f"{where}: {key}")
    experts = max((config.get(key) or 0 for key in _WHOLE if _WHOLE[key] == EXPERTS), default=0)
    layers = config.get("num_hidden_layers") or 0
    if layers * experts > EXPERTS_IN_ALL:
        raise UserError(f"{where}: {layers} layers of {experts} experts; at most {EXPERTS_IN_ALL} in all are read")


def _check(where, key, value, prefix=""):
    problem = None if value is None else _problem(key, value)
    if problem:
        raise UserError(f"{where}: {prefix}{key} = {short_repr(value)}: must be {problem}")


def _problem(key, value):
    """Describes what a non-null value should be; None if it is right."""
    if key in _WHOLE:
        listed = key in _LISTED and isinstance(value, list) and len(value) < LONGEST
        items = value if listed else [value]
        right = all(type(item) is int and 0 <= item <= _WHOLE[key] for item in items)
        return None if right else f"a whole number of at most {_WHOLE[key]:,}" + ", or a list" * (key in _LISTED)
    if key in _NUMBERS:
        least, most = _NUMBERS[key]
        return None if _is_number(value) and least <= value <= most else f"a number from {least:g} to {most:g}"
    if key in _TEXTS:
        return None if isinstance(value, str) and len(value) < LONGEST else "a text"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if key in _LISTS:
        return _list_problem(value, _LISTS[key])
    return _plain_problem(value)


def _list_problem(value, kind):
    if not isinstance(value, list) or len(value) > LONGEST:
        return f"a list of at most {LONGEST:,}"
    if kind is float and not all(_is_number(item) and 1e-6 < item < 1e6 for item in value):
        return "a list of numbers from 1e-6 to 1e6"
    if kind in (int, str) and not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
        return f"a list of {'whole numbers' if kind is int else 'texts'}"
    return None


def _plain_problem(value):
    """Like `_problem`, for keys without a known type: numbers and sizes must be reasonable."""
    if isinstance(value, int | float) and not abs(value) <= _ANY and not math.isinf(value):
        return f"a number of at most {_ANY:g}"
    if isinstance(value, list | dict | str) and len(value) > VOCABULARY:
        return f"of at most {VOCABULARY:,} entries"
    return None


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
