"""Rotary positions between config.json and our specs, with every kind of scaling."""

import json
import math

from efficientllm import registry

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


def position(keys, max_positions, *, base=10_000.0, fraction=None, interleaved=False, original=None, aliases=()):
    """`(base, our position spec)` of a config.json, whatever generation of keys it has.

    Args:
      base: where no key says it.
      fraction: the share of a head that is turned where no key says it; None: the family turns whole heads.
      original: the original length of families that have it beside the scaling's keys, where it is missing there.
      aliases: pairs of a scaling's name in this family and the one that it means.

    Raises UserError for a kind of scaling, or a key of one, that ours does not have.
    """
    given = _parameters(keys)
    original = keys.take("original_max_position_embeddings", default=original)
    base = given.pop("rope_theta", None) or keys.number("rope_theta", "rotary_emb_base", kind=float, default=base)
    share = given.pop("partial_rotary_factor", None)
    share = share or keys.take("partial_rotary_factor", "rotary_pct", default=fraction or 1.0)
    if fraction is None and share != 1.0:
        raise keys.refusal("partial_rotary_factor", share, "this family turns whole heads")
    old, new = given.pop("type", None), given.pop("rope_type", None)
    kind = dict(aliases).get(new or old, new or old) or "default"
    fields = {"fraction": float(share)} if share != 1.0 else {}
    if interleaved:
        fields["interleaved"] = True
    if kind != "default":
        original = original or given.pop("original_max_position_embeddings", None)
        fields["scaling"] = _scaling(keys, kind, given, original, max_positions)
    given.pop("original_max_position_embeddings", None)
    for key, value in given.items():
        if value is not None:
            raise keys.refusal(f"rope_parameters.{key}", value, f"rope scaling {kind!r} of ours has no such key")
    return float(base), spec("rope", fields)


def _parameters(keys):
    scaling, parameters = keys.take("rope_scaling", default={}), keys.take("rope_parameters", default={})
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            raise keys.refusal(name, value, "layers of ours share one rotation, given by one dict of values")
    return parameters | scaling


def _scaling(keys, kind, given, original, max_positions):
    """The spec of a scaling; takes its keys out of `given`."""
    if kind not in SCALINGS:
        raise keys.refusal("rope_type", kind, f"known: default, {', '.join(SCALINGS)}")
    name, names = SCALINGS[kind]
    given["original_max_position_embeddings"] = max_positions if kind == "dynamic" else (original or max_positions)
    if kind == "longrope":
        _complete_longrope(given, max_positions)
    if kind == "yarn":
        _check_yarn(keys, given, max_positions)
    fields = {ours: given.pop(theirs, None) for ours, theirs in names.items()}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
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


def parameters(position_spec):
    """`rope_parameters` of a position spec of ours: the inverse of `position`."""
    _, fields = registry.parse(position_spec)
    name, values = registry.parse(fields.get("scaling", "none"))
    found = {"rope_theta": fields["base"], "rope_type": "default" if name == "none" else name}
    if fields.get("fraction", 1.0) != 1.0:
        found["partial_rotary_factor"] = fields["fraction"]
    if name != "none":
        _, names = SCALINGS[name]
        found |= {names[key]: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if name == "dynamic":  # transformers takes max_position_embeddings
        del found["original_max_position_embeddings"]
    return json.loads(json.dumps(found))


def spec(name, fields):
    """`name(key=value, ...)`."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items())})" if fields else name
