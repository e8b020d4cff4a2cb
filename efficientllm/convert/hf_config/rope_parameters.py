"""Rotary positions between config.json and our specs, with every kind of scaling."""

import json
import math

from efficientllm import registry
from efficientllm.errors import UserError

# transformers' rope_type -> our rope_scaling, and our field -> their key.
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


# Keys of published scalings that no class of transformers reads (Yarn-Llama-2, DeepSeek-R1-0528-Qwen3-8B).
_UNREAD = frozenset({"finetuned", "attn_factor", "extrapolation_factor"})


def position(
    keys, max_positions, *, fraction=None, interleaved=False, aliases=(), names=("rope_theta", "partial_rotary_factor")
):
    """`(base, our position spec)` of a config.json, whatever generation of keys it has.

    Args:
      fraction: the share of a head that is turned where no key says it; None: the family turns whole heads.
      aliases: pairs of a scaling's name in this family and the one that it means.
      names: the keys beside the scaling that say the base and the share.

    Raises UserError for a kind of scaling, or a key of one, that ours does not have, and for two places of a value that
    differ.
    """
    given = _parameters(keys)
    original = _original(keys, given)
    base = _once(keys, given, "rope_theta", names[0], keys.base)
    share = _once(keys, given, "partial_rotary_factor", names[1], fraction or 1.0)
    if fraction is None and share != 1.0:
        raise keys.refusal("partial_rotary_factor", share, "this family turns whole heads")
    old, new = given.pop("type", None), given.pop("rope_type", None)
    kind = dict(aliases).get(new or old, new or old) or "default"
    fields = {"fraction": float(share)} if share != 1.0 else {}
    if interleaved:
        fields["interleaved"] = True
    if kind != "default":
        fields["scaling"] = _scaling(keys, kind, given, original, max_positions)
    for key, value in given.items():
        if value is not None and key not in _UNREAD:
            raise keys.refusal(f"rope_parameters.{key}", value, f"rope scaling {kind!r} of ours has no such key")
    return float(base), spec("rope", fields)


def _once(keys, given, inner, outer, default):
    """A value that stands in the rotation's dict, beside it, or in both. Raises UserError where they differ.

    Beside it the class reads `outer` alone; `inner`, of other families and generations, must then say the same.
    """
    found = {f"rope_parameters.{inner}": given.pop(inner, None), outer: keys.take(outer, default=None)}
    value = next((value for value in found.values() if value is not None), default)
    if outer != inner:
        found[inner] = keys.take(inner, default=None)
    for name, other in found.items():
        if other is not None and other != value:
            raise UserError(
                f"{keys.where}: {name} = {json.dumps(other)}, but the class of this family takes {json.dumps(value)}, "
                f"of rope_parameters.{inner} or {outer}; make them equal"
            )
    return value


def _original(keys, given):
    """The original length, beside the rotation's dict or in it; a family that has it beside has it there alone."""
    said = keys.has("original_max_position_embeddings")
    outer = keys.take("original_max_position_embeddings", default=None)
    inner = given.pop("original_max_position_embeddings", None)
    if said and None not in (inner, outer) and inner != outer:
        raise UserError(
            f"{keys.where}: original_max_position_embeddings = {outer} differs from {inner} in rope_parameters; keep "
            "one of them"
        )
    return outer or inner


def _parameters(keys):
    """What `rope_scaling` and `rope_parameters` say together. Raises UserError where they differ."""
    given = {name: keys.take(name, default={}) for name in ("rope_scaling", "rope_parameters")}
    for name, value in given.items():
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            raise keys.refusal(name, value, "layers of ours share one rotation, given by one dict of values")
    scaling, parameters = given["rope_scaling"], given["rope_parameters"]
    for key in scaling.keys() & parameters.keys():
        if scaling[key] != parameters[key] and None not in (scaling[key], parameters[key]):
            raise UserError(
                f"{keys.where}: {key} = {json.dumps(scaling[key])} in rope_scaling and {json.dumps(parameters[key])} "
                "in rope_parameters; keep one of them"
            )
    return parameters | {key: value for key, value in scaling.items() if value is not None}


def _scaling(keys, kind, given, original, max_positions):
    """The spec of a scaling; takes its keys out of `given`."""
    if kind not in SCALINGS:
        raise keys.refusal("rope_type", kind, f"known: default, {', '.join(SCALINGS)}")
    name, names = SCALINGS[kind]
    given["original_max_position_embeddings"] = max_positions if kind == "dynamic" else (original or max_positions)
    if given.get("factor") is None and kind in ("linear", "dynamic", "llama3"):
        raise UserError(f"{keys.where}: rope scaling {kind!r} has no factor; give rope_parameters.factor")
    if kind == "longrope":
        _complete_longrope(given, max_positions)
    if kind == "yarn":
        _check_yarn(keys, given, max_positions)
    fields = {ours: given.pop(theirs, None) for ours, theirs in names.items()}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    given.pop("original_max_position_embeddings", None)
    if kind == "longrope" and keys.keeps_keys and values["short_factor"] != values["long_factor"]:
        values["keeps_keys"] = True
    return spec(name, {key: value for key, value in values.items() if value is not None})


def _complete_longrope(given, max_positions):
    """The factor on both waves, where it is not given: sqrt(1 + ln factor / ln original) (arXiv:2402.13753)."""
    original = given["original_max_position_embeddings"]
    factor = given.pop("factor", None) or max_positions / original
    if given.get("attention_factor") is None:
        given["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _check_yarn(keys, given, max_positions):
    given["factor"] = given.get("factor") or max_positions / given["original_max_position_embeddings"]
    if given.pop("truncate", True) is False:
        raise keys.refusal("rope_parameters.truncate", False, "yarn of ours rounds the range of its ramp")
    factor = given.pop("attention_factor", None)
    grown = given.get("mscale") and given.get("mscale_all_dim")
    default = 1.0 if given["factor"] <= 1 else 0.1 * math.log(given["factor"]) + 1.0
    if factor is not None and (grown or abs(factor - default) > 1e-6):
        raise keys.refusal("rope_parameters.attention_factor", factor, f"yarn of ours has {default:.6f} here")


def usable(position_spec, max_positions):
    """The most positions of a model whose config.json names `max_positions`: what its scaling is for is in reach."""
    name, values = registry.parse_spec(registry.parse_spec(position_spec)[1].get("scaling", "none"))
    if max_positions is None or name not in ("linear", "dynamic", "yarn"):
        return max_positions
    unscaled = values["original_length"] if name == "yarn" else max_positions
    return max(max_positions, int(unscaled * values["factor"]))


def named(position_spec, max_positions):
    """What config.json names for so many `usable` positions."""
    name, values = registry.parse_spec(registry.parse_spec(position_spec)[1].get("scaling", "none"))
    if name == "dynamic":  # transformers takes it for the original length
        return values["original_length"]
    return math.ceil(max_positions / values["factor"]) if name == "linear" else max_positions


def parameters(position_spec):
    """`rope_parameters` of a position spec of ours: the inverse of `position`."""
    _, fields = registry.parse_spec(position_spec)
    name, values = registry.parse_spec(fields.get("scaling", "none"))
    found = {"rope_theta": fields["base"], "rope_type": "default" if name == "none" else name}
    if fields.get("fraction", 1.0) != 1.0:
        found["partial_rotary_factor"] = fields["fraction"]
    if name != "none":
        _, names = SCALINGS[name]
        named = {names[key]: value for key, value in values.items() if key in names}
        found |= {key: list(value) if isinstance(value, tuple) else value for key, value in named.items()}
    if name == "dynamic":
        del found["original_max_position_embeddings"]
    return json.loads(json.dumps(found))


def older_keys(config):
    """What transformers 4 reads of `rope_parameters`, to stand beside it: `rope_theta`, `rope_scaling` and the share.

    transformers 5 takes `rope_scaling`, where it is there, for all of `rope_parameters`: it says the same.
    """
    given = dict(config.get("rope_parameters") or {})
    if not given:
        return {}
    neox = config["model_type"] == "gpt_neox"
    found = {"rotary_emb_base" if neox else "rope_theta": given.pop("rope_theta")}
    if (share := given.pop("partial_rotary_factor", None)) is not None:
        found["rotary_pct" if neox else "partial_rotary_factor"] = share
    kind = given.pop("rope_type", "default")
    if kind == "longrope" and config["model_type"] == "phi3":
        return found | _phi3_scaling(config, given)
    if kind == "longrope":
        found["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    return found | {"rope_scaling": None if kind == "default" else {"rope_type": kind} | given}


def _phi3_scaling(config, given):
    """Phi-3 of transformers 4 admits three keys and derives the amplitude; nothing where it is another one."""
    original, most = config.get("original_max_position_embeddings", 4096), config.get("max_position_embeddings", 4096)
    derived = {"original_max_position_embeddings": original}
    _complete_longrope(derived, most)
    if not math.isclose(derived["attention_factor"], given.get("attention_factor", derived["attention_factor"])):
        return {}
    return {"rope_scaling": {"type": "longrope"} | {key: given[key] for key in ("short_factor", "long_factor")}}


def spec(name, fields):
    """`name(key=value, ...)`."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items())})" if fields else name
