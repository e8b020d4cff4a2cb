"""Checkpoint families: from a config.json to overrides of `config.model`, and the name table of its tensors.

A key that would change a logit is honoured, or refused by name (`checked_keys`).
"""

import dataclasses
import os
import typing

from efficientllm.convert.hf_config import dense_decoders, moe_decoders, rope_parameters, state_space
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.tensors import name_tables
from efficientllm.errors import UserError, did_you_mean

_BUFFERS = (r"rotary_emb\.inv_freq$",)


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    Args:
      architecture: its class in transformers.
      describe: maps `CheckedKeys` and max_positions to overrides of `config.model`.
      table: names of its tensors (`name_tables`).
      ignored: regular expressions of tensors in older files that no model needs.
    """

    architecture: str
    describe: typing.Callable[[CheckedKeys, int | None], dict]
    table: dict[str, tuple]
    ignored: tuple[str, ...] = _BUFFERS

    @property
    def backbone(self) -> str:
        """The class without a head; its files name the same tensors without a prefix."""
        return self.architecture.replace("ForCausalLM", "Model")


@dataclasses.dataclass(frozen=True)
class Description:
    """Description of a config.json: overrides of `config.model`, and the most positions after rope scaling."""

    model: dict[str, typing.Any]
    max_positions: int | None
    model_type: str


def describe_config(config: dict[str, typing.Any], where: str | os.PathLike[str]) -> Description:
    """Describes a config.json (a dict). Raises UserError naming a key that cannot be honoured."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type = {model_type!r} is none of {', '.join(FAMILIES)}"
            f"{did_you_mean(str(model_type), FAMILIES)}"
        )
    keys = CheckedKeys(config, where)
    keys.expect("is_encoder_decoder", False, because="ours is a decoder")
    max_positions = keys.number("max_position_embeddings", default=None)
    family = FAMILIES[model_type]
    for name in config.get("architectures") or ():
        if name not in (family.architecture, family.backbone):
            raise keys.refusal("architectures", [name], f"only {family.architecture} of this family is")
    model = family.describe(keys, max_positions)
    model["tied"] = keys.take("tie_word_embeddings", default=False)
    keys.finish()
    return Description(_complete(model), rope_parameters.usable_positions(model["position"], max_positions), model_type)


def ignored_patterns(config: dict[str, typing.Any]) -> tuple[str, ...]:
    """Patterns of tensors that the model of a config.json does not need.

    DeepSeek-V3 stores its multi-token prediction as layers after the last; transformers does not load them.
    """
    patterns = FAMILIES[config["model_type"]].ignored
    if config["model_type"] != "deepseek_v3":
        return patterns
    depth, predicted = config.get("num_hidden_layers", 61), config.get("num_nextn_predict_layers") or 1
    numbers = "|".join(str(depth + i) for i in range(min(predicted, 16)))
    return (*patterns, rf"^model\.layers\.({numbers})\.")


def _complete(model):
    """Adds every architecture key of `config.model`, so that none keeps another config's value."""
    plain = {"ffn": "swiglu", "residual": "sequential", "norm": "rmsnorm", "embed_norm": False, "pattern": ()}
    complete = plain | model | {"parameters_of": ""}
    pattern = _period(complete["pattern"])
    if len(pattern) == 1:
        mixer, _, ffn = pattern[0].partition("|")
        complete |= {"mixer": mixer.strip(), "ffn": ffn.strip() or complete["ffn"]}
    return complete | {"pattern": pattern if len(pattern) > 1 else ()}


def _period(layers):
    """The shortest pattern whose repetition gives all layers."""
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
