"""Vision-language families (Qwen2.5-VL, Qwen2-VL, LLaVA, InternVL): from config.json keys to `config.model`."""

import typing

from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.hf_config.vision_defaults import LLAVA_VISION, VISION_OF_CHAT
from efficientllm.convert.hf_config.vision_parts import (
    GELUS,
    Values,
    ffn_of,
    grid_of,
    heads_of,
    language_model,
    square,
    sub_config,
    text_keys_of,
)
from efficientllm.registry import format_spec, parse_spec

_GELU_FFNS = {name: f"gelu(kind={kind!r})" for name, kind in GELUS.items()}
_SILU_FFNS = dict.fromkeys(("silu", "swish"), "swiglu(use_bias=True)")
_BIASES = "mha(qkv_bias=True, o_bias=True)"
_OF_QWEN = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
_TOP = frozenset({*_OF_QWEN, "vision_config", "architectures", "model_type", "torch_dtype", "dtype"})


def qwen2_5_vl(keys: CheckedKeys, max_positions: int | None) -> Values:
    """Qwen2_5_VLForConditionalGeneration of transformers."""
    return _qwen(keys, "qwen2_5_vl", _qwen2_5_tower)


def qwen2_vl(keys: CheckedKeys, max_positions: int | None) -> Values:
    """Qwen2VLForConditionalGeneration of transformers; QvQ is one."""
    return _qwen(keys, "qwen2_vl", _qwen2_tower)


def _qwen(keys, model_type, describe_tower):
    image_token = keys.take("image_token_id")
    for name in _OF_QWEN:
        keys.take(name, default=None)
    vision = sub_config(keys, "vision_config", {}) | {"model_type": f"{model_type}_vision"}
    tied = keys.take("tie_word_embeddings", default=False)
    if keys.has("text_config"):
        text = sub_config(keys, "text_config", {})
    else:  # files of the hub have the keys of the language model beside those of the whole
        text = text_keys_of(keys, _TOP) | {"model_type": f"{model_type}_text"}
    model = language_model(keys, text, (f"{model_type}_text",))
    return _joined(keys, model, vision, describe_tower, image_token, tied)


def _joined(keys, model, vision, describe_tower, image_token, tied):
    """The values of `config.model` of a language model and the tower that a dict describes."""
    dim = parse_spec(model["size"])[1]["dim"]
    inner = CheckedKeys(vision, f"{keys.where}: vision_config")
    tower = describe_tower(inner, keys, dim)
    inner.finish()
    ends = {"tower": format_spec("vit", tower), "image_token": image_token}
    return model | {"embed": format_spec("vision", ends), "tied": tied or model["tied"]}


def _qwen2_5_tower(vision, keys, features):
    full, layers = vision.take("fullatt_block_indexes"), vision.number("depth")
    if not isinstance(full, list | tuple) or not all(type(i) is int for i in full):
        raise vision.refusal("fullatt_block_indexes", full, "it must be a list of layers")
    window, merge, patch = (vision.number(name) for name in ("window_size", "spatial_merge_size", "patch_size"))
    if window < merge * patch:
        raise vision.refusal("window_size", window, f"a window holds {merge * patch} pixels at least")
    vision.take("tokens_per_second")  # of videos
    if (out := vision.number("out_hidden_size")) != features:
        raise vision.refusal("out_hidden_size", out, f"the language model has {features} features")
    ffn = ffn_of(vision, _SILU_FFNS)
    side = window // merge // patch
    windowed = f"image_window(qkv_bias=True, o_bias=True, bin={(side * merge) ** 2})"
    layers_of = tuple(f"{_BIASES if i in full else windowed} | {ffn}" for i in range(layers))
    dim, hidden = vision.number("hidden_size"), vision.number("intermediate_size")
    norm = "rmsnorm(eps=1e-06)"
    pattern = _period(layers_of)
    has_windows = any(entry.startswith("image_window") for entry in pattern)
    tower = _qwen_tower(vision, layers, dim, hidden, pattern, norm, merge, patch)
    return tower | ({"window": side} if has_windows else {})


def _qwen2_tower(vision, keys, features):
    dim, ratio = vision.number("embed_dim"), vision.number("mlp_ratio", kind=float)
    if (out := vision.number("hidden_size")) != features:
        raise vision.refusal("hidden_size", out, f"the language model has {features} features")
    merge, patch = vision.number("spatial_merge_size"), vision.number("patch_size")
    pattern = (f"{_BIASES} | {ffn_of(vision, _GELU_FFNS)}",)
    layers = vision.number("depth")
    return _qwen_tower(vision, layers, dim, int(dim * ratio), pattern, "layernorm(eps=1e-06)", merge, patch)


def _qwen_tower(vision, layers, dim, hidden, pattern, norm, merge, patch):
    heads = heads_of(vision, dim, "num_heads")
    if dim // heads % 4:
        raise vision.refusal("num_heads", heads, "a head's features turn by row and by column: give a multiple of 4")
    rope = sub_config(vision, "rope_parameters", {})
    if rope.pop("rope_type", "axial") != "axial" or set(rope) - {"rope_theta"}:
        raise vision.refusal("rope_parameters", rope, "the tower turns by row and column, unscaled")
    pairs = dim // heads // 4
    position = {"base": float(rope.get("rope_theta", 1e4)), "sections": (pairs, pairs), "restart": True}
    for name in ("in_chans", "spatial_patch_size"):  # which the class does not read
        vision.take(name, default=None)
    return {
        "num_layers": layers,
        "dim": dim,
        "num_heads": heads,
        "hidden": hidden,
        "patch": patch,
        "frames": vision.number("temporal_patch_size"),
        "channels": vision.number("in_channels"),
        "pattern": pattern,
        "position": format_spec("rope", position),
        "norm": norm,
        "merge": merge,
        "projector_norm": norm,
        "projector_hidden": dim * merge**2,
    }


def llava(keys: CheckedKeys, max_positions: int | None) -> Values:
    """LlavaForConditionalGeneration of transformers, with a CLIP tower."""
    image_token = keys.take("image_token_index", "image_token_id")
    keys.take("image_seq_length")
    tied = keys.take("tie_word_embeddings", default=False)
    vision = sub_config(keys, "vision_config", LLAVA_VISION)
    model = language_model(keys, sub_config(keys, "text_config", {}), ("llama", "mistral", "qwen2", "qwen3"))
    return _joined(keys, model, vision, _clip_tower, image_token, tied)


def unread_by_llava(config: Values) -> tuple[str, ...]:
    """Patterns of tensors of the tower's layers after the one whose output is read, and of its last norm."""
    vision = (config.get("vision_config") or LLAVA_VISION) | {"model_type": "clip_vision_model"}
    layers = CheckedKeys(vision, "config.json").number("num_hidden_layers")
    layer = CheckedKeys(config, "config.json").take("vision_feature_layer")
    first = layers + 1 + layer if layer < 0 else layer
    numbers = "|".join(map(str, range(first, layers)))
    norm = r"^vision_tower\..*\.post_layernorm\."
    return (norm, rf"^vision_tower\..*\.encoder\.layers\.({numbers})\.") if numbers else (norm,)


def _clip_tower(vision, keys, features):
    kind = vision.take("model_type", default="clip_vision_model")
    if kind != "clip_vision_model":
        raise vision.refusal("model_type", kind, "the tower of this family is a clip_vision_model")
    _projector(keys)
    layers, layer = vision.number("num_hidden_layers"), keys.take("vision_feature_layer")
    if type(layer) is not int or not -layers <= layer <= layers or layer == 0:
        raise keys.refusal("vision_feature_layer", layer, "it must be one layer of the tower")
    dim, patch = vision.number("hidden_size"), square(vision, "patch_size")
    grid = grid_of(vision, patch)
    vision.take("projection_dim", default=None)  # of CLIP as a whole
    vision.take("vocab_size", default=None)
    return {
        "num_layers": layers + 1 + layer if layer < 0 else layer,
        "dim": dim,
        "num_heads": heads_of(vision, dim, "num_attention_heads"),
        "hidden": vision.number("intermediate_size"),
        "patch": patch,
        "channels": vision.number("num_channels"),
        "grid": grid,
        "pattern": (f"{_BIASES} | {ffn_of(vision, _GELU_FFNS)}",),
        "position": format_spec("learned", {"max_length": grid**2 + 1}),
        "norm": format_spec("layernorm", {"eps": vision.number("layer_norm_eps", kind=float)}),
        "class_token": True,
        "embed_norm": True,
        "projector_hidden": features,
        "projector_bias": keys.take("multimodal_projector_bias"),
    }


def _projector(keys):
    """Takes the keys of a projector between class token and language model."""
    keys.expect("projector_hidden_act", "gelu", because="the projector has the exact GELU")
    keys.expect("vision_feature_select_strategy", "default", because="features of the class token are left out")


def internvl(keys: CheckedKeys, max_positions: int | None) -> Values:
    """InternVLForConditionalGeneration of transformers."""
    image_token = keys.take("image_token_id")
    keys.take("image_seq_length")
    tied = keys.take("tie_word_embeddings")
    vision = sub_config(keys, "vision_config", {}) | {"model_type": "internvl_vision"}
    model = language_model(keys, sub_config(keys, "text_config", {}), ("qwen2", "llama", "mistral", "qwen3"))
    return _joined(keys, model | {"tied": False}, vision, _intern_tower, image_token, tied)


def internvl_chat(keys: CheckedKeys, max_positions: int | None) -> Values:
    """InternVLChatModel as OpenGVLab publishes it, whose keys have other names than those of transformers."""
    text, vision = (sub_config(keys, f"{part}_config", {}) for part in ("llm", "vision"))
    text.setdefault("model_type", "qwen2")
    if (shuffle := keys.take("ps_version", default="v1")) != "v2":
        raise keys.refusal("ps_version", shuffle, "neighbours are joined in the order of version v2")
    keys.expect("pad2square", False, because="pictures are cut into tiles")
    for name in ("dynamic_image_size", "use_thumbnail"):
        keys.expect(name, True, because="pictures are cut into tiles, and are a tile of their own beside them")
    for name in ("use_backbone_lora", "use_llm_lora"):
        keys.expect(name, 0, because="adapters must be merged first")
    image_size = vision.get("image_size", VISION_OF_CHAT["image_size"])
    keys.expect("force_image_size", image_size, because="the table of positions would be another")
    image_token = keys.take("image_token_id", default=_CONTEXT_TOKENS.get(text.get("vocab_size")))
    if image_token is None:
        raise keys.refusal("image_token_id", None, "the id of <IMG_CONTEXT> is not known of this vocabulary; add it")
    kinds = ("qwen2", "llama", "qwen3")
    model = language_model(keys, text, kinds)
    # The keys of the part in transformers' names.
    vision = VISION_OF_CHAT | {key: value for key, value in vision.items() if value is not None}
    renamed = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
    vision = {renamed.get(key, key): value for key, value in vision.items()} | {"model_type": "internvl_vision"}
    return _joined(keys, model, vision, _chat_tower, image_token, False)


# Keys of OpenGVLab's towers that say nothing where `use_moe` is false.
_EXPERT_KEYS = (
    "moe_coeff_ratio",
    "moe_intermediate_size",
    "moe_output_scale",
    "noisy_gate_policy",
    "num_experts",
    "num_routed_experts",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "use_residual",
    "use_weighted_residual",
)
_CONTEXT_TOKENS = {151674: 151667}  # the id of <IMG_CONTEXT> by vocabulary: that of Qwen2.5 with InternVL's tokens


def _chat_tower(vision, keys, features):
    keys.expect("select_layer", -1, because="features are of the last layer")
    vision.expect("use_moe", False, because="the tower's blocks are dense")
    for name in _EXPERT_KEYS:
        vision.take(name, default=None)
    eps = vision.number("layer_norm_eps", kind=float)
    return _shuffled_tower(vision, keys, features, eps, eps)


def _intern_tower(vision, keys, features):
    _projector(keys)
    keys.expect("vision_feature_layer", -1, because="features are of the last layer")
    return _shuffled_tower(vision, keys, features, vision.number("layer_norm_eps", kind=float), 1e-6)


def _shuffled_tower(vision, keys, features, eps, qk_eps):
    ratio = keys.take("downsample_ratio")
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1 or 1 / ratio != int(1 / ratio):
        raise keys.refusal("downsample_ratio", ratio, "it must be one over a whole number")
    vision.expect("use_absolute_position_embeddings", True, because="the tower has a table of positions")
    for name in ("use_mask_token", "layer_scale_init_value", "hidden_dropout_prob", "projection_dropout"):
        vision.take(name, default=None)
    dim, patch, merge = vision.number("hidden_size"), square(vision, "patch_size"), int(1 / ratio)
    grid = grid_of(vision, patch)
    norm = vision.take("norm_type")
    if norm not in ("layer_norm", "rms_norm"):
        raise vision.refusal("norm_type", norm, "known are layer_norm, rms_norm")
    mixer: dict[str, typing.Any] = {"qkv_bias": vision.take("attention_bias"), "o_bias": True}
    if vision.take("use_qk_norm"):
        mixer |= {"qk_norm": "all", "norm": format_spec("rmsnorm", {"eps": qk_eps})}
    return {
        "num_layers": vision.number("num_hidden_layers"),
        "dim": dim,
        "num_heads": heads_of(vision, dim, "num_attention_heads"),
        "hidden": vision.number("intermediate_size"),
        "patch": patch,
        "channels": vision.number("num_channels"),
        "grid": grid,
        "pattern": (f"{format_spec('mha', mixer)} | {ffn_of(vision, _GELU_FFNS)}",),
        "position": format_spec("learned", {"max_length": grid**2 + 1}),
        "norm": format_spec(norm.replace("_", ""), {"eps": eps}),
        "final_norm": "" if vision.take("use_mean_pooling") else format_spec("layernorm", {"eps": eps}),
        "modulation": "layerscale",
        "patch_bias": True,
        "class_token": True,
        "merge": merge,
        "projector_norm": "layernorm(eps=1e-05)",
        "norm_after_merge": True,
        "projector_hidden": features,
    }


def _period(layers):
    """The shortest pattern whose repetition gives all layers."""
    lengths = (length for length in range(1, len(layers) + 1) if len(layers) % length == 0)
    return next(layers[:length] for length in lengths if layers == layers[:length] * (len(layers) // length))
