"""Parts of a vision-language model's config.json: those of the language model and of the tower, nested or flat."""

import typing

from efficientllm.convert.hf_config import dense_decoders
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.errors import UserError
from efficientllm.registry import format_spec, parse_spec

Values = dict[str, typing.Any]
_DECODERS = {
    "llama": dense_decoders.llama,
    "mistral": dense_decoders.mistral,
    "qwen2": dense_decoders.qwen2,
    "qwen3": dense_decoders.qwen3,
    "qwen2_vl_text": dense_decoders.qwen2,
    "qwen2_5_vl_text": dense_decoders.qwen2,
}
_SECTIONS = (16, 24, 24)  # of Qwen's M-RoPE where a file names none
GELUS = {"quick_gelu": "quick", "gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def sub_config(keys: CheckedKeys, name: str, default: Values) -> Values:
    """Takes the dict under a key; `default` where the file has none. Raises UserError for another type."""
    values = keys.take(name, default=default)
    if not isinstance(values, dict):
        raise keys.refusal(name, values, "it must be a dict of the keys of that part")
    return dict(values)


def language_model(keys: CheckedKeys, text: Values, kinds: tuple[str, ...]) -> Values:
    """Describes the language model of `text`, with its context length as `max_positions`.

    Raises UserError for a `model_type` that is none of `kinds`.
    """
    name = text.setdefault("model_type", kinds[0])
    if name not in kinds:
        raise keys.refusal("text_config.model_type", name, f"known of this family are {', '.join(kinds)}")
    sections = _take_sections(keys, text) if name.endswith("_vl_text") else ()
    inner = CheckedKeys(text, f"{keys.where}: text_config")
    tied = inner.take("tie_word_embeddings", default=False)
    max_positions = inner.number("max_position_embeddings", default=None)
    model = _DECODERS[name](inner, max_positions)
    inner.finish()
    if sections:
        position, fields = parse_spec(model["position"])
        model["position"] = format_spec(position, fields | {"sections": sections})
    return model | {"tied": tied, "max_positions": max_positions}


def _take_sections(keys, text):
    """Takes `mrope_section` out of the rope dicts of `text`, and the name `mrope`, which is no scaling."""
    sections = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.get(name)
        if not isinstance(rope, dict):
            continue
        text[name] = rope = {key: "default" if value == "mrope" else value for key, value in rope.items()}
        if (value := rope.pop("mrope_section", None)) is not None:
            sections.append(value)
    if len(set(map(repr, sections))) > 1:
        raise keys.refusal("mrope_section", sections, "two values differ; keep one")
    values = sections[0] if sections else _SECTIONS
    if not isinstance(values, list | tuple) or not all(type(pairs) is int and pairs > 0 for pairs in values):
        raise keys.refusal("mrope_section", values, "it must be a list of pairs of a head for time, row and column")
    if len(values) != 3:
        raise keys.refusal("mrope_section", values, "three axes are known: time, row and column")
    return tuple(values)


def text_keys_of(config: CheckedKeys, known: typing.Container[str]) -> Values:
    """Takes the keys of a flat file that are not `known` of the whole model: those of its language model."""
    return config.take_all(lambda name: name not in known)


def square(keys: CheckedKeys, name: str) -> int:
    """Takes a side: a number, or a list of two equal ones. Raises UserError for sides that differ."""
    value = keys.take(name)
    sides = value if isinstance(value, list | tuple) else [value]
    if not sides or len(set(sides)) > 1 or type(sides[0]) is not int or sides[0] < 1:
        raise keys.refusal(name, value, "it must be one side, or two equal ones")
    return sides[0]


def grid_of(keys: CheckedKeys, patch: int) -> int:
    """Takes the side of an image, in patches. Raises UserError for one that is no multiple of a patch."""
    side = square(keys, "image_size")
    if side % patch:
        raise keys.refusal("image_size", side, f"it must be a multiple of patch_size = {patch}")
    return side // patch


def ffn_of(keys: CheckedKeys, known: Values) -> str:
    """Takes the activation of an ffn; `known` maps its names to `ffn` specs."""
    name = keys.take("hidden_act")
    if name not in known:
        raise keys.refusal("hidden_act", name, f"known are {', '.join(known)}")
    return known[name]


def heads_of(keys: CheckedKeys, dim: int, name: str) -> int:
    """Takes the number of heads. Raises UserError where it does not divide the width."""
    heads = keys.number(name)
    if dim % heads:
        raise UserError(f"{keys.where}: {name} = {heads} does not divide the width {dim}; give heads that do")
    return heads
