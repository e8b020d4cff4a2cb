"""Canonical description of a language model: two models with equal descriptions compute the same function.

It verifies that an exported config.json, read back, is the model that was exported.
"""

import typing

from efficientllm import model
from efficientllm.registry import build, parse_spec, spec_parameters


def canonical(lm: model.LM) -> dict[str, typing.Any]:
    """`{property: value}` of an LM; `layers` holds a pair of mixer's and ffn's properties for each block, in order."""
    blocks = tuple((_layer("mixer", mixer), _layer("ffn", ffn)) for mixer, ffn in model.parts(lm))
    return {
        "dim": lm.dim,
        "vocab_size": lm.vocab_size,
        "tied": lm.tied,
        "embed_norm": lm.embed_norm,
        "residual": lm.residual,
        "norm": parse_spec(lm.norm),
        "layers": blocks * lm.num_groups,
    }


def differences(a: dict[str, typing.Any], b: dict[str, typing.Any]) -> list[str]:
    """Messages naming the properties in which two descriptions differ; of layers, only of the first that differs."""
    messages = [f"{key} is {a[key]!r}, not {b[key]!r}" for key in a if key != "layers" and a[key] != b[key]]
    if len(a["layers"]) != len(b["layers"]):
        return [*messages, f"there are {len(a['layers'])} blocks, not {len(b['layers'])}"]
    for i, pairs in enumerate(zip(a["layers"], b["layers"], strict=True)):
        for layer_a, layer_b in zip(*pairs, strict=True):
            for key in sorted(layer_a.keys() | layer_b.keys(), key=lambda key: (key not in ("mixer", "ffn"), key)):
                if layer_a.get(key) != layer_b.get(key):
                    messages.append(f"{key} of layer {i} is {layer_a.get(key)!r}, not {layer_b.get(key)!r}")
        if messages:
            break
    return messages


def _layer(kind, layer):
    """`{kind: what the layer computes, hyperparameter: value}`; None computes nothing."""
    if layer is None:
        return {kind: None}
    # Not inherited: a subclass may compute something else.
    fields = {kind: vars(type(layer)).get("family", type(layer).__name__)} | layer.hyperparameters()
    expanded = {"position": _position, "norm": parse_spec}
    return {name: expanded[name](value) if name in expanded else value for name, value in fields.items()}


def _position(spec):
    """A position's name and fields, those at their defaults too."""
    name, _ = parse_spec(spec)
    built = build("position", spec, parent=None)
    values = {field: getattr(built, field) for field in spec_parameters(type(built))}
    if "scaling" in values:
        values["scaling"] = build("rope_scaling", values["scaling"])
    return name, values
