"""Canonical description of a model, by which an exported config.json is verified when it is read back.

Two models with equal descriptions compute the same function, whatever specs they were built from.
"""

import itertools
import typing

from efficientllm import model
from efficientllm.registry import build, parse_spec, spec_parameters

_ENDS = {
    "text": ("vocab_size", "tied", "embed_norm"),
    "images": (
        "patch",
        "size",
        "any_size",
        "channels",
        "classes",
        "learned_sigma",
        "time_denominator",
        "text_length",
        "text_dim",
        "pooled_dim",
        "text_embed",
    ),
    "text and images": ("vocab_size", "tied", "embed_norm", "image_token"),
    "prompts": ("vocab_size", "causal", "end_id", "projection"),
}
_OF_TOWER = (
    "dim",
    "patch",
    "frames",
    "channels",
    "grid",
    "merge",
    "window",
    "patch_bias",
    "class_token",
    "embed_norm",
    "norm_after_merge",
    "projector_hidden",
    "projector_bias",
    "features",
)


def canonical(lm: model.Backbone) -> dict[str, typing.Any]:
    """`{property: value}` of a model; `layers` holds the properties of each block, in order.

    Those of a block are the first mixer's, the ffn's, and those of further mixers that are parallel to the first.
    """
    blocks = [
        (_layer("mixer", mixers[0]), _layer("ffn", ffn), *(_layer("mixer", mixer) for mixer in mixers[1:]))
        for mixers, ffn in model.parts(lm)
    ]
    groups = [tuple(blocks[i] for i in stack.blocks) for stack in lm.stacks for _ in stack.groups]
    facts = {"dim": lm.dim} | {name: getattr(lm, name) for name in _ENDS[lm.reads]}
    if lm.reads == "images":  # the blocks of a language model have them in their fields, or have none
        facts |= {"position": _position(lm.position), "modulation": parse_spec(lm.modulation)[0]}
        facts |= {"size": None, "text_length": None} if lm.any_size else {}
        facts |= {"ffn_norm": parse_spec(lm.ffn_norm or lm.norm)}
    if lm.reads == "text and images":
        facts |= {"tower": _tower(lm.vision)}
    return facts | {
        "residual": lm.residual,
        "norm": parse_spec(lm.norm),
        "layers": sum(groups, ()),
    }


def _tower(tower):
    """The facts of a vision tower: of its blocks, and its other fields that an output depends on."""
    blocks = [(_layer("mixer", mixers[0]), _layer("ffn", ffn)) for mixers, ffn in model.parts(tower)]
    layers = [tuple(blocks[i] for i in stack.blocks) for stack in tower.stacks for _ in stack.groups]
    own = {name: getattr(tower, name) for name in _OF_TOWER}
    own |= {name: parse_spec(getattr(tower, name) or "none") for name in ("norm", "final_norm", "projector_norm")}
    return own | {
        "position": _position(tower.position),
        "modulation": parse_spec(tower.modulation)[0],
        "layers": layers,
    }


def differences(a: dict[str, typing.Any], b: dict[str, typing.Any]) -> list[str]:
    """Messages naming the properties in which two descriptions differ; of layers, only of the first that differs."""
    messages = [f"{key} is {a[key]!r}, not {b[key]!r}" for key in a if key != "layers" and a[key] != b[key]]
    if len(a["layers"]) != len(b["layers"]):
        return [*messages, f"there are {len(a['layers'])} blocks, not {len(b['layers'])}"]
    for i, pairs in enumerate(zip(a["layers"], b["layers"], strict=True)):
        layers: typing.Iterator[tuple[dict, dict]] = itertools.zip_longest(*pairs, fillvalue={})
        for layer_a, layer_b in layers:
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
