"""Wan 2.1 text to video (arXiv:2503.20314): from the keys of a config.json of diffusers to `config.model`, and back."""

import typing

from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.hf_config.rope_parameters import format_spec
from efficientllm.embeds.patches import Denoiser
from efficientllm.registry import build, parse_spec

NAME = "WanTransformer3DModel"
SIZE = (21, 60, 104)  # latents of 81 frames of 480 x 832, by default; every other size will do
TEXT_LENGTH = 512  # tokens of UMT5, whose states are padded with zeros


def wan(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """WanTransformer3DModel of diffusers, text to video."""
    heads, head_dim = keys.number("num_attention_heads"), keys.number("attention_head_dim")
    patch, channels, eps = _patch(keys), keys.number("in_channels"), keys.number("eps", kind=float)
    if (outputs := keys.number("out_channels", default=channels)) != channels:
        raise keys.refusal("out_channels", outputs, f"in_channels = {channels} are: it predicts no more than it reads")
    if head_dim % 2 or head_dim < 6:
        raise keys.refusal("attention_head_dim", head_dim, "a head needs pairs for frames, rows and columns")
    keys.expect("cross_attn_norm", True, because="known is a norm before cross-attention")
    keys.expect("qk_norm", "rms_norm_across_heads", because="known is 'rms_norm_across_heads'")
    keys.expect("freq_dim", 256, because="noise levels have 256 features")
    for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if (value := keys.take(name, default=None)) is not None:
            raise keys.refusal(name, value, "it is of models that continue an image; known is text to video")
    attention = {"qkv_bias": True, "o_bias": True, "qk_norm": "all", "norm": format_spec("rmsnorm", {"eps": eps})}
    cross = attention | {"input_norm": format_spec("layernorm", {"eps": eps})}
    columns = head_dim // 6
    rope = {"sections": (head_dim // 2 - 2 * columns, columns, columns), "restart": True, "interleaved": True}
    table = keys.number("rope_max_seq_len")
    embed = {"patch": patch, "size": _usual_size(patch, table), "any_size": True, "channels": channels, "classes": 0}
    embed |= {"text_length": TEXT_LENGTH, "text_dim": keys.number("text_dim")}
    # A block of self-attention is half a layer, and one of cross-attention and an ffn a whole one.
    size = {"num_layers": 3 * _even(keys) // 2, "dim": heads * head_dim, "num_heads": heads, "num_kv_heads": heads}
    size |= {"head_dim": head_dim, "hidden": keys.number("ffn_dim"), "rope_base": 1e4, "norm_eps": eps, "patch": patch}
    return {
        "size": format_spec("custom", size),
        "mixer": "mha",
        "ffn": format_spec("gelu", {"kind": "tanh"}),
        "pattern": (f"{format_spec('mha', attention)} | none", f"{format_spec('cross', cross)} | gelu(kind='tanh')"),
        "position": format_spec("rope", rope | {"table": table}),
        "norm": "layernorm(affine=False)",
        "modulation": "table",
        "embed": format_spec("patches", embed),
        "tied": False,
    }


def _patch(keys):
    patch = keys.take("patch_size")
    if not (isinstance(patch, list | tuple) and len(patch) == 3 and patch[0] == 1 and patch[1] == patch[2] > 0):
        raise keys.refusal("patch_size", patch, "patches are squares of one frame, such as [1, 2, 2]")
    return patch[1]


def _usual_size(patch, table):
    """`SIZE` in whole patches, and no more tokens along an axis than the table of rotations has."""
    patches = (1, patch, patch)
    return tuple(size * max(1, min(length // size, table)) for length, size in zip(SIZE, patches, strict=True))


def _even(keys):
    if (layers := keys.number("num_layers")) % 2:
        raise keys.refusal("num_layers", layers, "layers are one and a half here, so their number must be even")
    return layers


def config_of(denoiser: Denoiser, facts: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """A config.json (a dict) with the `facts` (`canonical`) of a denoiser."""
    (mixer, *_), (_, ffn, *_) = facts["layers"][:2]
    position = build("position", denoiser.position, parent=None)
    return {
        "_class_name": NAME,
        "patch_size": [1, denoiser.patch, denoiser.patch],
        "num_attention_heads": mixer["num_heads"],
        "attention_head_dim": mixer["head_dim"],
        "in_channels": denoiser.channels,
        "out_channels": denoiser.out_channels,
        "text_dim": denoiser.text_dim,
        "freq_dim": 256,
        "ffn_dim": ffn["hidden"],
        "num_layers": len(facts["layers"]) // 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": parse_spec(denoiser.norm)[1]["eps"],
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": position.table,
        "pos_embed_seq_len": None,
    }
