"""InternVL of OpenGVLab's layout as the model of transformers, whose class has other names for the same tensors.

The code beside OpenGVLab's files is not run: the class of the folders whose name ends in -hf gets their tensors.
"""

import re
import typing

import numpy as np

from efficientllm.convert.files import quantized
from efficientllm.convert.hf_config.vision_defaults import VISION_OF_CHAT
from efficientllm.convert.source import Source
from efficientllm.errors import UserError

# From names of parameters of transformers to those of OpenGVLab's tensors, in turn.
_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^model\.vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^model\.vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (r"^model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.([qk])_norm\.", r".attn.\1_norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
)
_QKV = re.compile(r"(vision_model\.encoder\.layers\.\d+)\.attention\.([qkv])_proj\.(weight|bias)")
_EPS = 1e-6  # of the norms of queries and keys in transformers' class


def build_reference(source: Source) -> typing.Any:
    """The model of transformers in float32, for evaluation, with the tensors of a folder in OpenGVLab's layout."""
    import torch
    import transformers

    config = _config(source, transformers)
    config._attn_implementation = "eager"
    model = transformers.InternVLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(_tensor(source, name), np.float32)))
    return model.eval()


def _config(source, transformers):
    """The config of transformers' class. The keys of `source.config` were checked when it was opened."""
    config = source.config
    text = {key: value for key, value in config["llm_config"].items() if key != quantized.KEY}
    text |= {"tie_word_embeddings": source.lm().tied}
    vision = VISION_OF_CHAT | {key: value for key, value in config["vision_config"].items() if value is not None}
    if vision["qk_normalization"] and vision["layer_norm_eps"] != _EPS:
        raise UserError(
            f"{source.path}: vision_config: layer_norm_eps = {vision['layer_norm_eps']}: norms of queries and keys "
            f"have {_EPS} in transformers' class, which check compares with; it cannot compare this folder"
        )
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_type")
    tower = {key: vision[key] for key in (*same, "layer_norm_eps", "num_channels")}
    tower |= {key: [vision[key]] * 2 for key in ("image_size", "patch_size")}
    tower |= {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"], "use_mean_pooling": True}
    kind = transformers.CONFIG_MAPPING[text.pop("model_type", "qwen2")]
    return transformers.InternVLConfig(
        text_config=kind(**text),
        vision_config=transformers.InternVLVisionConfig(**tower),
        image_token_id=source.lm().image_token,
        downsample_ratio=config["downsample_ratio"],
        tie_word_embeddings=source.lm().tied,
    )


def _tensor(source, name):
    """The tensor of a parameter of transformers; queries, keys and values are rows of one tensor of the file."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if (match := _QKV.fullmatch(name)) is None:
        return source.tensors.read(name)
    layer, letter, kind = match.groups()
    return np.split(source.tensors.read(f"{layer}.attn.qkv.{kind}"), 3)["qkv".index(letter)]
