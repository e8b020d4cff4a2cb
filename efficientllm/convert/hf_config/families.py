"""Checkpoint families: from a config.json to overrides of `config.model`, and the name table of its tensors.

A key that would change a logit is honoured, or refused by name (`checked_keys`).
"""

import dataclasses
import os
import re
import typing

import numpy as np

from efficientllm.convert.hf_config import (
    denoisers,
    dense_decoders,
    moe_decoders,
    rope_parameters,
    sd3,
    state_space,
    text_encoders,
    vision_language,
    wan,
)
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.tensors import denoiser_names, name_tables, vision_names
from efficientllm.errors import UserError, did_you_mean
from efficientllm.registry.block_entries import parse_entry

_BUFFERS = (r"rotary_emb\.inv_freq$",)


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of transformers, or a `_class_name` of diffusers.

    Args:
      architecture: its class.
      describe: maps `CheckedKeys` and max_positions to overrides of `config.model`.
      table: names of its tensors (`name_tables`).
      ignored: regular expressions of tensors in older files that no model needs.
      stem: of the files of its tensors.
      constants: `{name: function of the model}` of tensors that are no parameters; a file may hold them.
      writes_constants: whether its files hold them always.
      objective: a spec of what its models are trained by.
      kept_patterns: function of a config.json; patterns of tensors that a model's class has and no output depends on.
      renames: from names of other generations of files to those of the table (`vision_names.rename`).
      modules: from names of the table to those of transformers' modules, where they are others.
    """

    architecture: str
    describe: typing.Callable[[CheckedKeys, int | None], dict]
    table: dict[str, tuple]
    ignored: tuple[str, ...] = _BUFFERS
    stem: str = "model"
    constants: dict[str, typing.Callable[[typing.Any], np.ndarray]] = dataclasses.field(default_factory=dict)
    writes_constants: bool = False
    objective: str = "ddpm"
    kept_patterns: typing.Callable[[dict], tuple[str, ...]] = lambda config: ()
    renames: vision_names.Renames = ()
    modules: vision_names.Renames = ()

    @property
    def backbone(self) -> str:
        """The class without a head; its files name the same tensors without a prefix."""
        return self.architecture.replace("ForCausalLM", "Model").replace("ForConditionalGeneration", "Model")


@dataclasses.dataclass(frozen=True)
class Description:
    """Description of a config.json: overrides of `config.model`, and the most positions after rope scaling."""

    model: dict[str, typing.Any]
    max_positions: int | None
    model_type: str


def family_name(config: dict[str, typing.Any]) -> str | None:
    """The name of a config.json's family: its `model_type`, or its `_class_name`."""
    return config.get("model_type") or config.get("_class_name")


def find_family(config: dict[str, typing.Any], where: str | os.PathLike[str] = "config.json") -> Family:
    """The family of a config.json (a dict). Raises UserError for a model that we do not compute."""
    name = family_name(config)
    for families in OF_MODALITY.values():
        if name in families:
            return families[name]
    key, names = ("_class_name", DENOISERS) if "model_type" not in config and name else ("model_type", MODEL_TYPES)
    raise UserError(f"{where}: {key} = {name!r} is none of {', '.join(names)}{did_you_mean(str(name), names)}")


def describe_config(config: dict[str, typing.Any], where: str | os.PathLike[str]) -> Description:
    """Describes a config.json (a dict). Raises UserError naming a key that cannot be honoured."""
    family, keys = find_family(config, where), CheckedKeys(config, where)
    if family_name(config) not in FAMILIES:
        _check_architecture(keys, config, family)
        model = family.describe(keys, None)
        keys.finish()
        positions = model.pop("max_positions", None)
        positions = positions and rope_parameters.usable_positions(model["position"], positions)
        return Description(_complete(model), positions, family_name(config))
    keys.expect("is_encoder_decoder", False, because="only decoders are read")
    max_positions = keys.number("max_position_embeddings", default=None)
    _check_architecture(keys, config, family)
    model = family.describe(keys, max_positions)
    model["tied"] = keys.take("tie_word_embeddings", default=False)
    keys.finish()
    positions = rope_parameters.usable_positions(model["position"], max_positions)
    return Description(_complete(model), positions, config["model_type"])


def _check_architecture(keys, config, family):
    """Refuses another class of a family; those of denoisers and text encoders are checked with their keys."""
    if config.get("model_type") not in FAMILIES | VISION:
        return
    for name in config.get("architectures") or ():
        if name not in (family.architecture, family.backbone):
            raise keys.refusal("architectures", [name], f"only {family.architecture} of this family is")


def ignored_patterns(config: dict[str, typing.Any]) -> tuple[str, ...]:
    """Patterns of tensors that the model of a config.json does not need.

    DeepSeek-V3 stores its multi-token prediction as layers after the last; transformers does not load them. LLaVA's
    tower has layers after the one whose output is read.
    """
    family = find_family(config)
    patterns = (*family.ignored, *family.kept_patterns(config))
    if family_name(config) != "deepseek_v3":
        return patterns
    depth, predicted = config.get("num_hidden_layers", 61), config.get("num_nextn_predict_layers") or 1
    numbers = "|".join(str(depth + i) for i in range(min(predicted, 16)))
    return (*patterns, rf"^model\.layers\.({numbers})\.")


def _complete(model):
    """Adds every architecture key of `config.model`, so that none keeps another config's value."""
    plain = {"ffn": "swiglu", "residual": "sequential", "norm": "rmsnorm", "embed_norm": False, "pattern": ()}
    plain |= {"embed": "tokens", "modulation": "plain"}
    complete = plain | model | {"parameters_of": ""}
    pattern = _period(complete["pattern"])
    if len(pattern) == 1 and not parse_entry(pattern[0]).repeats:
        mixer, _, ffn = pattern[0].partition("|")
        complete |= {"mixer": mixer.strip(), "ffn": ffn.strip() or complete["ffn"]}
        pattern = ()
    return complete | {"pattern": pattern}


def _period(layers):
    """The shortest pattern whose repetition gives all layers; entries with repeats are one after another."""
    if any(parse_entry(layer).repeats for layer in layers):
        return layers
    for length in range(1, len(layers) + 1):
        if len(layers) % length == 0 and layers == layers[:length] * (len(layers) // length):
            return layers[:length]
    return layers


_NEOX_BUFFERS = (*_BUFFERS, r"attention\.bias$", r"attention\.masked_bias$")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", dense_decoders.llama, name_tables.LLAMA),
    "mistral": Family("MistralForCausalLM", dense_decoders.mistral, name_tables.LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", dense_decoders.qwen2, name_tables.LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", dense_decoders.qwen3, name_tables.LLAMA),
    "phi3": Family("Phi3ForCausalLM", dense_decoders.phi3, name_tables.PHI3),
    "mixtral": Family("MixtralForCausalLM", moe_decoders.mixtral, name_tables.MIXTRAL),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", moe_decoders.qwen2_moe, name_tables.QWEN_MOE),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", moe_decoders.qwen3_moe, name_tables.QWEN_MOE),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", moe_decoders.deepseek_v2, name_tables.DEEPSEEK),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", moe_decoders.deepseek_v3, name_tables.DEEPSEEK),
    "gpt_neox": Family("GPTNeoXForCausalLM", dense_decoders.gpt_neox, name_tables.GPT_NEOX, _NEOX_BUFFERS),
    "mamba": Family("MambaForCausalLM", state_space.mamba, name_tables.MAMBA),
    "mamba2": Family("Mamba2ForCausalLM", state_space.mamba2, name_tables.MAMBA2),
}
_STEM = "diffusion_pytorch_model"
_DIT = Family(
    "DiTTransformer2DModel",
    denoisers.dit,
    denoiser_names.DIT,
    (),
    _STEM,
    {"pos_embed.pos_embed": denoisers.positions_of},
)
# By `_class_name`.
DENOISERS = {
    "DiTTransformer2DModel": _DIT,
    "Transformer2DModel": _DIT,
    wan.NAME: Family(wan.NAME, wan.wan, denoiser_names.WAN, (), _STEM, objective="flow(label_dropout=0.0)"),
    "DiT": Family(
        "DiT",
        denoisers.dit_original,
        denoiser_names.DIT_ORIGINAL,
        (),
        constants={"pos_embed": denoisers.positions_of},
        writes_constants=True,
    ),
    sd3.NAME: Family(
        sd3.NAME,
        sd3.transformer,
        denoiser_names.SD3,
        (),
        _STEM,
        constants={"pos_embed.pos_embed": sd3.positions_of},
        writes_constants=True,
        objective=sd3.OBJECTIVE,
    ),
    # The file also holds the autoencoder, and may hold the text encoders.
    sd3.SINGLE_FILE: Family(
        sd3.SINGLE_FILE,
        sd3.transformer,
        denoiser_names.SD3_SINGLE_FILE,
        (rf"^(?!{re.escape(sd3.PREFIX)})",),
        constants={f"{sd3.PREFIX}pos_embed": sd3.positions_of},
        writes_constants=True,
        objective=sd3.OBJECTIVE,
    ),
}
# Text encoders, by `model_type`.
_CLIP_BUFFERS = (r"embeddings\.position_ids$",)
ENCODERS = {
    "clip_text_model": Family("CLIPTextModel", text_encoders.clip, name_tables.CLIP, _CLIP_BUFFERS),
    "t5": Family("T5EncoderModel", text_encoders.t5, name_tables.T5, ()),
    "umt5": Family("UMT5EncoderModel", text_encoders.umt5, name_tables.UMT5, ()),
}
# Vision-language models, by `model_type`.
_CONDITIONAL = "ForConditionalGeneration"
VISION = {
    "qwen2_5_vl": Family(
        f"Qwen2_5_VL{_CONDITIONAL}",
        vision_language.qwen2_5_vl,
        vision_names.QWEN2_5_VL,
        renames=vision_names.QWEN_RENAMES,
        modules=vision_names.QWEN_MODULES,
    ),
    "qwen2_vl": Family(
        f"Qwen2VL{_CONDITIONAL}",
        vision_language.qwen2_vl,
        vision_names.QWEN2_VL,
        renames=vision_names.QWEN_RENAMES,
        modules=vision_names.QWEN_MODULES,
    ),
    "llava": Family(
        f"Llava{_CONDITIONAL}",
        vision_language.llava,
        vision_names.LLAVA,
        (*_BUFFERS, r"embeddings\.position_ids$"),
        kept_patterns=vision_language.unread_by_llava,
        renames=vision_names.LLAVA_RENAMES,
        modules=vision_names.LLAVA_MODULES,
    ),
    "internvl_chat": Family("InternVLChatModel", vision_language.internvl_chat, vision_names.INTERNVL_CHAT),
    "internvl": Family(
        f"InternVL{_CONDITIONAL}",
        vision_language.internvl,
        vision_names.INTERNVL,
        kept_patterns=lambda config: (r"embeddings\.mask_token$",),
        renames=vision_names.INTERNVL_RENAMES,
        modules=vision_names.INTERNVL_MODULES,
    ),
}
MODEL_TYPES = FAMILIES | VISION | ENCODERS
# Families of the models that read something (`Backbone.reads`).
OF_MODALITY = {"text": FAMILIES, "images": DENOISERS, "prompts": ENCODERS, "text and images": VISION}
