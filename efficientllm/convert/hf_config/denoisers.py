"""Diffusion transformers: from the keys of a config.json to `config.model`, and back.

DiT (arXiv:2212.09748) has two forms, which compute different functions: the published one, and that of diffusers, whose
time frequencies have another denominator and whose norm before the ffn has another eps.
"""

import math
import typing

import numpy as np

from efficientllm.convert.hf_config import sd3, wan
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.embeds.patches import Denoiser
from efficientllm.errors import UserError
from efficientllm.ops.patches import sincos_2d
from efficientllm.registry import format_spec, parse_spec

EPS = 1e-6  # of all norms but diffusers' norm before the ffn
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published models, by width
_KINDS = {"gelu-approximate": "tanh", "gelu": "erf"}


def dit(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """DiTTransformer2DModel of diffusers."""
    heads, head_dim = keys.number("num_attention_heads"), keys.number("attention_head_dim")
    channels = keys.number("in_channels")
    outputs = keys.number("out_channels", default=channels)
    if outputs not in (channels, 2 * channels):
        raise keys.refusal("out_channels", outputs, f"in_channels = {channels}, or twice as many with variances, are")
    activation = keys.take("activation_fn")
    if activation not in _KINDS:
        raise keys.refusal("activation_fn", activation, f"known are {', '.join(_KINDS)}")
    keys.expect("norm_type", "ada_norm_zero", because="the blocks of DiT are adaLN-Zero")
    keys.expect("norm_elementwise_affine", False, because="the norms of DiT have no parameters")
    keys.expect("attention_type", "default", because="known is 'default'")
    keys.expect("double_self_attention", False, because="the blocks of DiT have one attention")
    for name in ("dropout", "norm_num_groups", "upcast_attention", "only_cross_attention", "use_linear_projection"):
        keys.take(name, default=None)  # of training, of other classes, and of half precision
    norm_eps = keys.number("norm_eps", kind=float)
    return _model(
        shape=(keys.number("num_layers"), heads, head_dim, 4 * heads * head_dim),
        qkv_bias=keys.take("attention_bias"),
        kind=_KINDS[activation],
        patch=keys.number("patch_size"),
        side=keys.number("sample_size"),
        channels=channels,
        classes=keys.number("num_embeds_ada_norm"),
        learned_sigma=outputs != channels,
        time_denominator=127,
        **({} if norm_eps == EPS else {"ffn_norm_eps": norm_eps}),
    )


def dit_original(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """DiT as it was published, by the arguments of its class."""
    dim, heads = keys.number("hidden_size"), keys.number("num_heads")
    if dim % heads:
        raise UserError(f"{keys.where}: num_heads = {heads} does not divide hidden_size = {dim}")
    dropout = keys.take("class_dropout_prob")
    if not isinstance(dropout, int | float) or not 0 < dropout < 1:
        raise keys.refusal("class_dropout_prob", dropout, "without dropout the label table has no row for no label")
    return _model(
        shape=(keys.number("depth"), heads, dim // heads, int(dim * keys.number("mlp_ratio", kind=float))),
        qkv_bias=True,
        kind="tanh",
        patch=keys.number("patch_size"),
        side=keys.number("input_size"),
        channels=keys.number("in_channels"),
        classes=keys.number("num_classes"),
        learned_sigma=keys.take("learn_sigma"),
        time_denominator=128,
    )


def _model(shape, qkv_bias, kind, patch, **embed):
    layers, heads, head_dim, hidden = shape
    size = {"num_layers": layers, "dim": heads * head_dim, "num_heads": heads, "num_kv_heads": heads}
    size |= {"head_dim": head_dim, "hidden": hidden, "rope_base": 1e4, "norm_eps": EPS, "patch": patch}
    return {
        "size": format_spec("custom", size),
        "mixer": format_spec("mha", {"qkv_bias": qkv_bias, "o_bias": True}),
        "ffn": format_spec("gelu", {"kind": kind}),
        "position": "sincos2d",
        "norm": "layernorm(affine=False)",
        "modulation": "linear",
        "embed": format_spec("patches", {"patch": patch, **embed}),
        "tied": False,
    }


def config_of_tensors(shapes: dict[str, tuple[int, ...]], where: typing.Any) -> dict[str, typing.Any] | None:
    """The arguments of a published DiT, or of a published SD3, by the shapes of its tensors; None for other tensors.

    Raises UserError for a width that was not published: the number of heads is in no shape.
    """
    if config := sd3.config_of_tensors(shapes):
        return config
    names = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    if not all(len(shapes.get(name, ())) == rank for name, rank in zip(names, (4, 2, 2), strict=True)):
        return None
    (dim, channels, patch, _), (rows, _), (features, _) = (shapes[name] for name in names)
    if dim not in HEADS:
        raise UserError(
            f"{where}: config.json is missing, and a width of {dim} was not published: write one with _class_name = "
            "'DiT' and the arguments of its class, num_heads among them"
        )
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    hidden = shapes.get("blocks.0.mlp.fc1.weight", (4 * dim,))[0]
    tokens = shapes["pos_embed"][1] if len(shapes.get("pos_embed", ())) == 3 else (32 // max(1, patch)) ** 2
    config = {"_class_name": "DiT", "input_size": math.isqrt(tokens) * patch, "patch_size": patch}
    config |= {"in_channels": channels, "hidden_size": dim, "depth": depth, "num_heads": HEADS[dim]}
    config |= {"mlp_ratio": hidden / dim, "class_dropout_prob": 0.1, "num_classes": rows - 1}
    return config | {"learn_sigma": features > channels * patch**2}


def positions_of(denoiser: Denoiser) -> np.ndarray:
    """The fixed positions that files of a published DiT hold, `[1, T, D]`."""
    side = denoiser.side // denoiser.patch
    return sincos_2d((side, side), denoiser.dim)[None]


def config_of(name: str, denoiser: Denoiser, facts: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """A config.json (a dict) of class `name` with the `facts` (`canonical`) of a denoiser."""
    if name == wan.NAME:
        return wan.config_of(denoiser, facts)
    if name in (sd3.NAME, sd3.SINGLE_FILE):
        return sd3.config_of(name, denoiser, facts)
    (mixer, ffn, *_), *_ = facts["layers"]
    if name == "DiT":
        return {
            "_class_name": name,
            "input_size": denoiser.side,
            "patch_size": denoiser.patch,
            "in_channels": denoiser.channels,
            "hidden_size": denoiser.dim,
            "depth": len(facts["layers"]),
            "num_heads": mixer["num_heads"],
            "mlp_ratio": ffn["hidden"] / denoiser.dim,
            "class_dropout_prob": 0.1,
            "num_classes": denoiser.classes,
            "learn_sigma": denoiser.learned_sigma,
        }
    kinds = {kind: activation for activation, kind in _KINDS.items()}
    return {
        "_class_name": name,
        "num_attention_heads": mixer["num_heads"],
        "attention_head_dim": mixer["head_dim"],
        "in_channels": denoiser.channels,
        "out_channels": denoiser.out_channels,
        "num_layers": len(facts["layers"]),
        "attention_bias": mixer["qkv_bias"],
        "sample_size": denoiser.side,
        "patch_size": denoiser.patch,
        "activation_fn": kinds.get(ffn["kind"]),
        "num_embeds_ada_norm": denoiser.classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": parse_spec(denoiser.ffn_norm or denoiser.norm)[1]["eps"],
    }
