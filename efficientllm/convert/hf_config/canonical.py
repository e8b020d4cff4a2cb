"""What of a model its logits depend on, as plain values: two models of equal facts are one model, however described."""

import dataclasses

from efficientllm import model
from efficientllm.ffns.dense import GELU, SwiGLU
from efficientllm.ffns.moe import MoE
from efficientllm.mixers.attention import GQA, MHA, MQA, Window
from efficientllm.mixers.mamba import Mamba
from efficientllm.mixers.mamba2 import Mamba2
from efficientllm.mixers.mla import MLA
from efficientllm.registry import build, parse_spec


def facts(lm):
    """`{fact: value}` of an LM; `layers` holds a pair of mixer's and ffn's facts for each block, in their order."""
    blocks = tuple((_mixer(mixer), _ffn(ffn)) for mixer, ffn in model.parts(lm))
    return {
        "dim": lm.dim,
        "vocab_size": lm.vocab_size,
        "tied": lm.tied,
        "embed_norm": lm.embed_norm,
        "residual": lm.residual,
        "norm": parse_spec(lm.norm),
        "layers": blocks * lm.num_groups,
    }


def differences(a, b):
    """`fact: value of a, not that of b` for each fact that differs; of layers, the first that does."""
    found = [f"{key} is {a[key]!r}, not {b[key]!r}" for key in a if key != "layers" and a[key] != b[key]]
    if len(a["layers"]) != len(b["layers"]):
        return [*found, f"there are {len(a['layers'])} blocks, not {len(b['layers'])}"]
    for i, (ours, theirs) in enumerate(zip(a["layers"], b["layers"], strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            for key in sorted(one.keys() | other.keys()):
                if one.get(key) != other.get(key):
                    found.append(f"{key} of layer {i} is {one.get(key)!r}, not {other.get(key)!r}")
        if found:
            break
    return found


def _mixer(mixer):
    kind = type(mixer)
    if kind in (MHA, MQA, GQA, Window):
        fields = {"mixer": "attention", "num_kv_heads": mixer.kv_heads, "window": mixer.keys_read}
        names = ("num_heads", "head_dim", "qkv_bias", "o_bias", "qk_norm")
        fields |= {"qk_norm_as": parse_spec(mixer.norm)} if mixer.qk_norm else {}
        return fields | _fields(mixer, names) | {"position": _position(mixer.position)}
    if kind is MLA:
        ranks = dict(zip(("kv_rank", "head_dim", "rope_dim", "v_dim"), mixer.widths, strict=True))
        position = {"position": _position(mixer.position)}
        return {"mixer": "mla", "num_heads": mixer.num_heads, "q_rank": mixer.q_rank or None} | ranks | position
    if kind is Mamba:
        names = ("channels", "state_dim", "conv", "use_bias", "conv_bias")
        return {"mixer": "mamba", "step_rank": mixer.step_rank or -(-mixer.dim // 16)} | _fields(mixer, names)
    if kind is Mamba2:
        names = ("channels", "width", "state_dim", "num_groups", "conv", "use_bias", "conv_bias", "eps")
        return {"mixer": "mamba2"} | _fields(mixer, names)
    return {"mixer": kind.__name__}


def _ffn(ffn):
    if type(ffn) is SwiGLU:
        return {"ffn": "swiglu", "hidden": ffn.hidden}
    if type(ffn) is GELU:
        return {"ffn": "gelu", "hidden": ffn.hidden, "ffn_bias": ffn.use_bias}
    if type(ffn) is MoE:
        names = ("num_experts", "top_k", "hidden", "scores", "normalise", "scale", "groups", "shared_hidden")
        rest = {"router_bias": ffn.bias_rate > 0, "top_groups": ffn.top_groups if ffn.groups > 1 else 1}
        return {"ffn": "moe"} | _fields(ffn, (*names, "shared_gate", "dispatch")) | rest
    return {"ffn": None if ffn is None else type(ffn).__name__}


def _fields(module, names):
    return {name: getattr(module, name) for name in names}


def _position(spec):
    """A position's name and fields, those at their defaults too."""
    name, _ = parse_spec(spec)
    built = build("position", spec, parent=None)
    names = [field.name for field in dataclasses.fields(built) if field.name not in ("parent", "name")]
    values = _fields(built, names)
    if "scaling" in values:
        values["scaling"] = build("rope_scaling", values["scaling"])
    return name, values
