"""Stable Diffusion 3 and 3.5 (MMDiT, arXiv:2403.03206): from config.json to `config.model`, and back.

Of a single file, which has no config.json, from the shapes of its tensors.
"""

import itertools
import math
import typing

import numpy as np

from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.hf_config.rope_parameters import format_spec
from efficientllm.embeds.patches import Denoiser
from efficientllm.errors import UserError
from efficientllm.ops.patches import sincos_2d
from efficientllm.registry import build

NAME, SINGLE_FILE = "SD3Transformer2DModel", "SD3"
PREFIX = "model.diffusion_model."  # of the names in a single file
# The condition of none of its training is an empty prompt's, which training here does not know: nothing is dropped.
OBJECTIVE = "flow(shift=3.0, label_dropout=0.0)"
EPS = 1e-6  # of all norms
TEXT_LENGTH = 333  # 77 tokens of CLIP and 256 of T5; states of another length will do
HEAD_DIM = 64  # of the published models: it is in no shape
SAMPLE_SIZE = 128  # likewise: latents of 1024 pixels


def transformer(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """SD3Transformer2DModel of diffusers."""
    heads, head_dim, channels = (
        keys.number(name) for name in ("num_attention_heads", "attention_head_dim", "in_channels")
    )
    if (width := keys.number("caption_projection_dim")) != heads * head_dim:
        problem = f"the streams of patches and text are of one width, {heads * head_dim}"
        raise keys.refusal("caption_projection_dim", width, problem)
    if (outputs := keys.number("out_channels", default=channels)) != channels:
        raise keys.refusal("out_channels", outputs, f"in_channels = {channels} are: it predicts no more than it reads")
    if (qk_norm := keys.take("qk_norm", default=None)) not in (None, "rms_norm"):
        raise keys.refusal("qk_norm", qk_norm, "known is 'rms_norm', or none")
    layers, dual = keys.number("num_layers"), keys.take("dual_attention_layers", default=[])
    if any(not 0 <= layer < layers for layer in dual):
        raise keys.refusal("dual_attention_layers", dual, f"there are layers 0 to {layers - 1}")
    return model(
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        dual=frozenset(dual),
        qk_norm=qk_norm is not None,
        patch=keys.number("patch_size"),
        side=keys.number("sample_size"),
        table=keys.number("pos_embed_max_size"),
        channels=channels,
        text_dim=keys.number("joint_attention_dim"),
        pooled_dim=keys.number("pooled_projection_dim"),
    )


def model(
    layers: int,
    heads: int,
    head_dim: int = HEAD_DIM,
    dual: typing.Collection[int] = (),
    qk_norm: bool = True,
    patch: int = 2,
    side: int = SAMPLE_SIZE,
    table: int = 192,
    channels: int = 16,
    text_length: int = TEXT_LENGTH,
    text_dim: int = 4096,
    pooled_dim: int = 2048,
) -> dict[str, typing.Any]:
    """Overrides of `config.model` that describe a model.

    `dual` are the layers with a second attention, of the patches alone; `table` is the side of the square of tokens
    that positions are cropped from.
    """
    norm = {"qk_norm": "head", "norm": format_spec("rmsnorm", {"eps": EPS})} if qk_norm else {}
    attention = format_spec("mha", {"qkv_bias": True, "o_bias": True} | norm)

    def mixers(layer):
        last = {"last": True} if layer == layers - 1 else {}
        joint = format_spec("joint", norm | last)
        return f"{joint} + {attention}" if layer in dual else joint

    kinds = [(len([*run]), mixer) for mixer, run in itertools.groupby(map(mixers, range(layers)))]
    ffn = "gelu(kind='tanh')"
    dim = heads * head_dim
    size = {"num_layers": layers, "dim": dim, "num_heads": heads, "num_kv_heads": heads, "head_dim": head_dim}
    size |= {"hidden": 4 * dim, "patch": patch}
    embed: dict[str, typing.Any] = {"patch": patch, "side": side, "any_size": True, "channels": channels, "classes": 0}
    embed |= {"text_length": text_length, "text_dim": text_dim, "text_embed": "linear", "pooled_dim": pooled_dim}
    return {
        "size": format_spec("custom", size | {"rope_base": 1e4, "norm_eps": EPS}),
        "mixer": kinds[0][1].partition(" + ")[0],
        "ffn": ffn,
        "pattern": tuple(f"{count} * {mixer} | {ffn}" for count, mixer in kinds),
        "position": format_spec("sincos2d", {"scale": side // patch / table, "table": table}),
        "norm": "layernorm(affine=False)",
        "modulation": "linear",
        "embed": format_spec("patches", embed),
        "tied": False,
    }


def positions_of(denoiser: Denoiser) -> np.ndarray:
    """The fixed table of positions that files hold, `[1, table^2, D]`."""
    position = build("position", denoiser.position, parent=None)
    return sincos_2d((position.table, position.table), denoiser.dim, position.scale)[None]


def config_of_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, typing.Any] | None:
    """The config of a published single file by the shapes of its tensors; None for other tensors.

    Heads are of 64 numbers, and the model was trained at 1024 pixels: neither is in a shape.
    """
    ranks = {"x_embedder.proj.weight": 4, "context_embedder.weight": 2, "y_embedder.mlp.0.weight": 2, "pos_embed": 3}
    shape_of = {name: shapes.get(f"{PREFIX}{name}", ()) for name in ranks}
    if any(len(shape_of[name]) != rank for name, rank in ranks.items()):
        return None
    dim, channels, patch, _ = shape_of["x_embedder.proj.weight"]
    blocks = {name.removeprefix(f"{PREFIX}joint_blocks.").partition(".") for name in shapes if ".joint_blocks." in name}
    layers = len({number for number, _, _ in blocks})
    dual = {int(number) for number, _, name in blocks if name == "x_block.attn2.qkv.weight"}
    is_normed = any(name == "x_block.attn.ln_q.weight" for _, _, name in blocks)
    return _config(
        SINGLE_FILE,
        dim=dim,
        heads=dim // HEAD_DIM,
        head_dim=HEAD_DIM,
        layers=layers,
        dual=sorted(dual),
        qk_norm=is_normed,
        patch=patch,
        side=SAMPLE_SIZE,
        table=math.isqrt(shape_of["pos_embed"][1]),
        channels=channels,
        text_dim=shape_of["context_embedder.weight"][1],
        pooled_dim=shape_of["y_embedder.mlp.0.weight"][1],
    )


def config_of(name: str, denoiser: Denoiser, facts: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """A config.json (a dict) of class `name` with the `facts` (`canonical`) of a denoiser."""
    mixer, *_ = facts["layers"][0]
    if mixer["mixer"] != "Joint":
        raise UserError("its layers have no joint attention")
    position = build("position", denoiser.position, parent=None)
    return _config(
        name,
        dim=denoiser.dim,
        heads=mixer["num_heads"],
        head_dim=mixer["head_dim"],
        layers=len(facts["layers"]),
        dual=[i for i, (_, _, *others) in enumerate(facts["layers"]) if others],
        qk_norm=bool(mixer["qk_norm"]),
        patch=denoiser.patch,
        side=round(position.scale * position.table) * denoiser.patch,
        table=position.table,
        channels=denoiser.channels,
        text_dim=denoiser.text_dim,
        pooled_dim=denoiser.pooled_dim,
    )


def _config(name, *, dim, heads, head_dim, layers, dual, qk_norm, patch, side, table, channels, text_dim, pooled_dim):
    return {
        "_class_name": name,
        "sample_size": side,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": text_dim,
        "caption_projection_dim": dim,
        "pooled_projection_dim": pooled_dim,
        "out_channels": channels,
        "pos_embed_max_size": table,
        "dual_attention_layers": list(dual),
        "qk_norm": "rms_norm" if qk_norm else None,
    }
