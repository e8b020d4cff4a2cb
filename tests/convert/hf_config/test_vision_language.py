"""Configs of vision-language models: parameters of published ones, class defaults, and what is refused."""

import dataclasses
import math

import flax.linen as nn
import jax
import pytest

from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.convert.hf_config import families
from efficientllm.convert.hf_config.class_defaults import BASES
from efficientllm.convert.hf_config.value_limits import check_values
from efficientllm.convert.hf_config.vision_defaults import LLAVA_VISION, VISION
from efficientllm.errors import UserError

transformers = pytest.importorskip("transformers")

_IDS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}
_IDS |= {"image_token_id": 151655, "video_token_id": 151656}
_MROPE = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rms_norm_eps": 1e-6}
_MROPE |= {"max_position_embeddings": 128000, "use_sliding_window": False, "sliding_window": 32768, **_IDS}
_OLD = {"in_chans": 3, "spatial_patch_size": 14}


def _qwen(layers, dim, heads, kv_heads, hidden, vocab_size, tied=False, model_type="qwen2_5_vl", **vision):
    """A config.json as the hub has it: flat, of the tower only what differs from the class."""
    shape = {"num_hidden_layers": layers, "hidden_size": dim, "num_attention_heads": heads, "vocab_size": vocab_size}
    shape |= {"num_key_value_heads": kv_heads, "intermediate_size": hidden, "max_window_layers": layers}
    return _MROPE | shape | {
        "model_type": model_type,
        "tie_word_embeddings": tied,
        "vision_config": _OLD | {"model_type": model_type} | vision,
    }  # fmt: skip


_OF_3B = {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2}
_LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
_QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 40}
_QWEN2 |= {"num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 151674, "rope_theta": 1e6}
_QWEN2 |= {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False}
_INTERN = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800}
_INTERN |= {"norm_type": "rms_norm", "use_qk_norm": True}
# Keys of OpenGVLab's files of InternVL3, of its tower and beside it, that say how it was made or what it has not.
_UNUSED = {"moe_coeff_ratio": 0.5, "moe_intermediate_size": 768, "moe_output_scale": 4.0, "num_experts": 8}
_UNUSED |= {"num_routed_experts": 4, "num_shared_experts": 4, "shared_expert_intermediate_size": 3072, "use_moe": False}
_UNUSED |= {"use_residual": True, "use_rts": False, "use_weighted_residual": False, "capacity_factor": 1.2}
_UNUSED |= {"drop_path_rate": 0.4, "laux_allreduce": "all_nodes", "noisy_gate_policy": "RSample_before"}
_UNUSED |= {"model_type": "intern_vit_6b", "initializer_factor": 0.1, "dropout": 0.0, "eval_capacity_factor": 1.4}
_TILES = {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12, "min_dynamic_patch": 1}
_TILES |= {
    "image_fold": None,
    "pad2square": False,
    "template": "internvl2_5",
    "use_llm_lora": 0,
    "system_message": None,
}
_AUTO = {"auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}, "hidden_size": 5120}
# name: config.json, parameters of the whole, of the tower with its projector
PUBLISHED = {
    "qwen2.5-vl-3b": (_qwen(36, 2048, 16, 2, 11008, 151936, True, **_OF_3B), 3_754_622_976, 668_684_288),
    "qwen2.5-vl-7b": (_qwen(28, 3584, 28, 4, 18944, 152064, hidden_size=1280), 8_292_166_656, 676_550_144),
    "qwen2.5-vl-72b": (
        _qwen(80, 8192, 64, 8, 29568, 152064, hidden_size=1280, intermediate_size=3456, out_hidden_size=8192),
        73_410_777_344,
        704_573_696,
    ),
    "qvq-72b": (
        _qwen(80, 8192, 64, 8, 29568, 152064, model_type="qwen2_vl", hidden_size=8192),
        73_405_560_320,
        699_356_672,
    ),
    # transformers has the tower's last layer and norm too, 12,598,272 parameters that nothing reads.
    "llava-1.5-7b": (
        {"model_type": "llava", "text_config": _LLAMA, "vision_config": LLAVA_VISION | {"vocab_size": 32000}},
        7_063_427_072 - 12_598_272,
        303_507_456 + 20_979_712 - 12_598_272,
    ),
    "internvl3-38b": (
        {"model_type": "internvl", "text_config": _QWEN2, "vision_config": _INTERN, "tie_word_embeddings": False},
        38_388_164_992,
        5_536_496_000 + 91_786_240,
    ),
    "internvl3-38b as published": (
        {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "llm_config": _QWEN2}
        | {"vision_config": {"num_hidden_layers": 45, "image_size": 448, "qkv_bias": False, "use_flash_attn": True}}
        | {"downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2", "force_image_size": 448},
        38_388_164_992,
        5_536_496_000 + 91_786_240,
    ),
    "internvl3-38b key by key": (
        {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "llm_config": _QWEN2}
        | {"vision_config": {"num_hidden_layers": 45, "image_size": 448, "qkv_bias": False} | _UNUSED}
        | {"downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2", "force_image_size": 448}
        | (_TILES | _AUTO),
        38_388_164_992,
        5_536_496_000 + 91_786_240,
    ),
}


def _count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    config, total, of_tower = PUBLISHED[name]
    check_values(config, "config.json")
    described = families.describe_config(config, "config.json")
    lm = from_config.from_config(from_config.complete_model(described.model))
    params = nn.unbox(model.abstract_params(lm))
    assert (_count(params), _count(params["vision"])) == (total, of_tower)


def test_nested_and_flat_files_are_one_model():
    """transformers 5 writes the language model's keys under `text_config`."""
    flat, _, _ = PUBLISHED["qwen2.5-vl-3b"]
    own = {*_IDS, "model_type", "vision_config", "tie_word_embeddings"}
    text = {key: value for key, value in flat.items() if key not in own} | {"model_type": "qwen2_5_vl_text"}
    vision = flat["vision_config"] | {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    nested = {key: value for key, value in flat.items() if key in own} | {"vision_config": vision, "text_config": text}
    inside = {key: value for key, value in nested.items() if key != "tie_word_embeddings"}
    inside["text_config"] = text | {"tie_word_embeddings": True}
    described = [families.describe_config(config, "config.json") for config in (flat, nested, inside)]
    assert described[0] == described[1] == described[2]
    assert described[0].max_positions == 128000 and described[0].model["tied"]


@pytest.mark.parametrize("name", VISION)
def test_defaults_are_those_of_the_class(name):
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    vision = {"qwen2_5_vl_vision": transformers.Qwen2_5_VLConfig, "qwen2_vl_vision": transformers.Qwen2VLConfig}
    vision |= {"internvl_vision": transformers.InternVLConfig}
    theirs = type(vision[name]().vision_config) if name in vision else kind[name]
    defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert {key: defaults[key] for key in VISION[name]} == VISION[name]
    if name.endswith("_text"):
        assert BASES[name] == theirs.default_theta


def test_the_tower_that_llava_has_by_default():
    theirs = transformers.LlavaConfig().vision_config
    assert {key: getattr(theirs, key) for key in LLAVA_VISION} == LLAVA_VISION


_7B, _LLAVA, _INTERNVL = (PUBLISHED[name][0] for name in ("qwen2.5-vl-7b", "llava-1.5-7b", "internvl3-38b"))

_CHAT = PUBLISHED["internvl3-38b as published"][0]


def _inner(config, part, **changes):
    return config | {part: config[part] | changes}


@pytest.mark.parametrize(
    "config, message",
    [
        (_7B | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "three axes are known"),
        (_7B | {"rope_scaling": {"type": "mrope", "mrope_section": "all"}}, "must be a list of pairs"),
        (_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, None),
        (_7B | {"hidden_act": "relu"}, 'text_config: hidden_act = "relu" is not supported'),
        (_7B | {"vision_config": 3}, "vision_config = 3 is not supported: it must be a dict"),
        (_7B | {"architectures": ["Qwen2ForCausalLM"]}, "only Qwen2_5_VLForConditionalGeneration of this family is"),
        (_inner(_7B, "vision_config", out_hidden_size=8), "out_hidden_size = 8 .* the language model has 3584"),
        (_inner(_7B, "vision_config", num_heads=7), "num_heads = 7 does not divide the width 1280"),
        (_inner(_7B, "vision_config", depth=10**9), "vision_config: depth = 1000000000: must be a whole number"),
        (_inner(_7B, "vision_config", rope_parameters={"rope_type": "yarn"}), "unscaled"),
        (_inner(_7B, "vision_config", hidden_act="gelu"), 'vision_config: hidden_act = "gelu" is not supported'),
        (_inner(_7B, "vision_config", fullatt_block_indexes="all"), "must be a list"),
        (_inner(_7B, "vision_config", window_size=14), "a window holds 28 pixels at least"),
        (_inner(_7B, "vision_config", deepstack_layer=[1]), "deepstack_layer = .* not known to have that key"),
        (_LLAVA | {"vision_feature_layer": [-2, -1]}, "must be one layer of the tower"),
        (_LLAVA | {"vision_feature_select_strategy": "full"}, "features of the class token are left out"),
        (_LLAVA | {"projector_hidden_act": "relu"}, "the projector has the exact GELU"),
        (_inner(_LLAVA, "vision_config", model_type="siglip_vision_model"), "is a clip_vision_model"),
        (_inner(_LLAVA, "text_config", model_type="mamba"), "known of this family are llama"),
        (_inner(_LLAVA, "vision_config", patch_size=[14, 16]), "one side, or two equal ones"),
        (_inner(_LLAVA, "vision_config", image_size=7), "it must be a multiple of patch_size = 14"),
        (_inner(_INTERNVL, "vision_config", image_size=[14, 14]), "merge = 2 does not divide grid = 1"),
        (_inner(_INTERNVL, "vision_config", num_attention_heads=0), "num_attention_heads = 0 must be a positive int"),
        (_LLAVA | {"image_token_index": "x"}, "image_token_index = 'x': must be a whole number"),
        (_CHAT | {"ps_version": None}, "in the order of version v2"),
        (_inner(_CHAT, "vision_config", use_moe=True), "the tower's blocks are dense"),
        (_CHAT | {"use_thumbnail": False}, "use_thumbnail = false is not supported"),
        (_CHAT | {"dynamic_image_size": False}, "dynamic_image_size = false is not supported"),
        (_CHAT | {"select_layer": -4}, "features are of the last layer"),
        (_CHAT | {"force_image_size": 224}, "the table of positions would be another"),
        (_inner(_CHAT, "llm_config", vocab_size=92553), "the id of <IMG_CONTEXT> is not known"),
        (_INTERNVL | {"downsample_ratio": 0.3}, "one over a whole number"),
        (_INTERNVL | {"vision_feature_layer": -2}, "features are of the last layer"),
        (_inner(_INTERNVL, "vision_config", norm_type="batch_norm"), "known are layer_norm, rms_norm"),
        (_INTERNVL | {"image_token_id": 200_000}, "image_token = 200000 .* the vocabulary has 151674"),
    ],
)
def test_what_is_refused(config, message):
    def describe():
        check_values(config, "config.json")
        described = families.describe_config(config, "config.json")
        return from_config.check(from_config.complete_model(described.model))

    if message is None:
        assert "yarn" in describe().position
        return
    with pytest.raises(UserError, match=message) as refused:
        describe()
    assert "\n" not in str(refused.value)
