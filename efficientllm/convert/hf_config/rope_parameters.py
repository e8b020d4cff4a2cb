"""Rotary position keys of config.json, with all rope scalings, to and from our position specs."""

import json
import math
import typing
from collections.abc import Sequence

from efficientllm import registry
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.errors import UserError
from efficientllm.registry import format_spec

# transformers' rope_type -> (our rope_scaling, {our field: transformers' key}).
SCALINGS = {
    "linear": ("linear", {"factor": "factor"}),
    "dynamic": ("dynamic", {"factor": "factor", "original_length": "original_max_position_embeddings"}),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
        },
    ),
    "longrope": (
        "longrope",
        {
            "short_factor": "short_factor",
            "long_factor": "long_factor",
            "original_length": "original_max_position_embeddings",
            "amplitude": "attention_factor",
        },
    ),
}


# Keys of published scalings that transformers does not read (Yarn-Llama-2, DeepSeek-R1-0528-Qwen3-8B).
_UNREAD = frozenset({"finetuned", "attn_factor", "extrapolation_factor"})


def read_position(
    keys: CheckedKeys,
    max_positions: int | None,
    *,
    fraction: float | None = None,
    interleaved: bool = False,
    aliases: Sequence[tuple[str, str]] = (),
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
) -> tuple[float, str]:
    """Reads `(base, position spec)` of a config.json with keys of any generation.

    Args:
      fraction: default share of a head that is rotated; None: the family rotates whole heads.
      aliases: pairs of a scaling's name in this family and its usual name.
      names: the top-level keys of the base and the share.

    Raises UserError for an unknown scaling or key of one, and for a value stated twice differently.
    """
    rope = _parameters(keys)
    original = _original(keys, rope)
    base = _once(keys, rope, "rope_theta", names[0], keys.base)
    share = _once(keys, rope, "partial_rotary_factor", names[1], fraction or 1.0)
    if fraction is None and share != 1.0:
        raise keys.refusal("partial_rotary_factor", share, "this family turns whole heads")
    old, new = rope.pop("type", None), rope.pop("rope_type", None)
    kind = dict(aliases).get(new or old, new or old) or "default"
    fields = {"fraction": float(share)} if share != 1.0 else {}
    if interleaved:
        fields["interleaved"] = True
    if kind != "default":
        fields["scaling"] = _scaling(keys, kind, rope, original, max_positions)
    for key, value in rope.items():
        if value is not None and key not in _UNREAD:
            raise keys.refusal(f"rope_parameters.{key}", value, f"rope scaling {kind!r} has no such key here")
    return float(base), format_spec("rope", fields)


def _once(keys, rope, inner, outer, default):
    """A value in the rope dict, at the top level, or in both. Raises UserError if they differ.

    At the top level the class reads only `outer`; `inner`, of other families and versions, must be equal to it.
    """
    places = {f"rope_parameters.{inner}": rope.pop(inner, None), outer: keys.take(outer, default=None)}
    value = next((value for value in places.values() if value is not None), default)
    if outer != inner:
        places[inner] = keys.take(inner, default=None)
    for name, other in places.items():
        if other is not None and other != value:
            raise UserError(
                f"{keys.where}: {name} = {json.dumps(other)}, but the class of this family takes {json.dumps(value)}, "
                f"of rope_parameters.{inner} or {outer}; make them equal"
            )
    return value


def _original(keys, rope):
    """The original length, at the top level or in the rope dict."""
    at_top = keys.has("original_max_position_embeddings")
    outer = keys.take("original_max_position_embeddings", default=None)
    inner = rope.pop("original_max_position_embeddings", None)
    if at_top and None not in (inner, outer) and inner != outer:
        raise UserError(
            f"{keys.where}: original_max_position_embeddings = {outer} differs from {inner} in rope_parameters; keep "
            "one of them"
        )
    return outer or inner


def _parameters(keys):
    """Merges `rope_scaling` and `rope_parameters`. Raises UserError where they differ."""
    dicts = {name: keys.take(name, default={}) for name in ("rope_scaling", "rope_parameters")}
    for name, value in dicts.items():
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            raise keys.refusal(name, value, "all layers share one rotation here, given by one dict of values")
    scaling, parameters = dicts["rope_scaling"], dicts["rope_parameters"]
    for key in scaling.keys() & parameters.keys():
        if scaling[key] != parameters[key] and None not in (scaling[key], parameters[key]):
            raise UserError(
                f"{keys.where}: {key} = {json.dumps(scaling[key])} in rope_scaling and {json.dumps(parameters[key])} "
                "in rope_parameters; keep one of them"
            )
    return parameters | {key: value for key, value in scaling.items() if value is not None}


def _scaling(keys, kind, rope, original, max_positions):
    """The spec of a scaling; removes its keys from `rope`."""
    if kind not in SCALINGS:
        raise keys.refusal("rope_type", kind, f"known: default, {', '.join(SCALINGS)}")
    name, names = SCALINGS[kind]
    rope["original_max_position_embeddings"] = max_positions if kind == "dynamic" else (original or max_positions)
    if rope.get("factor") is None and kind in ("linear", "dynamic", "llama3"):
        raise UserError(f"{keys.where}: rope scaling {kind!r} has no factor; give rope_parameters.factor")
    if kind == "longrope":
        _complete_longrope(rope, max_positions)
    if kind == "yarn":
        _check_yarn(keys, rope, max_positions)
    fields = {field: rope.pop(key, None) for field, key in names.items()}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    rope.pop("original_max_position_embeddings", None)
    if kind == "longrope" and keys.keeps_keys and values["short_factor"] != values["long_factor"]:
        values["keeps_keys"] = True
    return format_spec(name, {key: value for key, value in values.items() if value is not None})


def _complete_longrope(rope, max_positions):
    """Sets a missing attention factor: sqrt(1 + ln factor / ln original) (arXiv:2402.13753)."""
    original = rope["original_max_position_embeddings"]
    factor = rope.pop("factor", None) or max_positions / original
    if rope.get("attention_factor") is None:
        rope["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _check_yarn(keys, rope, max_positions):
    rope["factor"] = rope.get("factor") or max_positions / rope["original_max_position_embeddings"]
    if rope.pop("truncate", True) is False:
        raise keys.refusal("rope_parameters.truncate", False, "yarn rounds the range of its ramp here")
    factor = rope.pop("attention_factor", None)
    grown = rope.get("mscale") and rope.get("mscale_all_dim")
    default = 1.0 if rope["factor"] <= 1 else 0.1 * math.log(rope["factor"]) + 1.0
    if factor is not None and (grown or abs(factor - default) > 1e-6):
        raise keys.refusal("rope_parameters.attention_factor", factor, f"yarn has {default:.6f} here")


def usable_positions(position_spec: str, max_positions: int | None) -> int | None:
    """The most positions of a model whose config.json states `max_positions`, after rope scaling."""
    name, values = registry.parse_spec(registry.parse_spec(position_spec)[1].get("scaling", "none"))
    if max_positions is None or name not in ("linear", "dynamic", "yarn"):
        return max_positions
    unscaled = values["original_length"] if name == "yarn" else max_positions
    return max(max_positions, int(unscaled * values["factor"]))


def named_positions(position_spec: str, max_positions: int) -> int:
    """The max_position_embeddings to write for so many usable positions; inverse of `usable_positions`."""
    name, values = registry.parse_spec(registry.parse_spec(position_spec)[1].get("scaling", "none"))
    if name == "dynamic":  # transformers reads it as the original length
        return values["original_length"]
    return math.ceil(max_positions / values["factor"]) if name == "linear" else max_positions


def write_parameters(position_spec: str) -> dict[str, typing.Any]:
    """Writes the `rope_parameters` of a position spec; inverse of `read_position`."""
    _, fields = registry.parse_spec(position_spec)
    name, values = registry.parse_spec(fields.get("scaling", "none"))
    rope = {"rope_theta": fields["base"], "rope_type": "default" if name == "none" else name}
    if fields.get("fraction", 1.0) != 1.0:
        rope["partial_rotary_factor"] = fields["fraction"]
    if name != "none":
        _, names = SCALINGS[name]
        renamed = {names[key]: value for key, value in values.items() if key in names}
        rope |= {key: list(value) if isinstance(value, tuple) else value for key, value in renamed.items()}
    if name == "dynamic":
        del rope["original_max_position_embeddings"]
    return json.loads(json.dumps(rope))


def older_keys(config: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The keys that transformers 4 reads instead of `rope_parameters`: `rope_theta`, `rope_scaling` and the share.

    transformers 5 prefers `rope_scaling` to `rope_parameters`; both say the same here.
    """
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return {}
    neox = config["model_type"] == "gpt_neox"
    older = {"rotary_emb_base" if neox else "rope_theta": rope.pop("rope_theta")}
    if (share := rope.pop("partial_rotary_factor", None)) is not None:
        older["rotary_pct" if neox else "partial_rotary_factor"] = share
    kind = rope.pop("rope_type", "default")
    if kind == "longrope" and config["model_type"] == "phi3":
        return older | _phi3_scaling(config, rope)
    if kind == "longrope":
        older["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return older | {"rope_scaling": None if kind == "default" else {"rope_type": kind} | rope}


def _phi3_scaling(config, rope):
    """`rope_scaling` for Phi-3 in transformers 4, which derives the amplitude itself; {} where that is another one."""
    original, most = config.get("original_max_position_embeddings", 4096), config.get("max_position_embeddings", 4096)
    derived = {"original_max_position_embeddings": original}
    _complete_longrope(derived, most)
    if not math.isclose(derived["attention_factor"], rope.get("attention_factor", derived["attention_factor"])):
        return {}
    return {"rope_scaling": {"type": "longrope"} | {key: rope[key] for key in ("short_factor", "long_factor")}}
