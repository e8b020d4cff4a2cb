"""Text encoders of diffusion models as values of `config.model`: what CLIP, T5 and UMT5 are made of."""

import typing

from efficientllm.architecture import from_config
from efficientllm.embeds.text_encoder import LARGEST, TextEncoder
from efficientllm.registry import format_spec

_COMMON = {
    "pattern": (),
    "residual": "sequential",
    "modulation": "plain",
    "parameters_of": "",
    "tied": False,
    "embed_norm": False,
}


def clip(ffn: str, max_length: int, end_id: int = LARGEST, projection: int = 0, skip: int = 0) -> dict[str, typing.Any]:
    """The values of `config.model`, but for its size, of the text encoder of CLIP with an `ffn`."""
    ends = {"causal": True, "skip": skip, "end_id": end_id, "projection": projection}
    return _COMMON | {
        "mixer": "mha(qkv_bias=True, o_bias=True)",
        "ffn": ffn,
        "position": format_spec("learned", {"max_length": max_length}),
        "norm": "layernorm",
        "embed": format_spec("text_encoder", ends),
    }


def t5(ffn: str, shared: bool, num_buckets: int = 32, max_distance: int = 128) -> dict[str, typing.Any]:
    """The values of `config.model`, but for its size, of the encoder of T5 v1.1, whose layers have a `shared` table of
    distances, or of UMT5, whose layers have a table each."""
    position = {"num_buckets": num_buckets, "max_distance": max_distance, "shared": shared}
    return _COMMON | {
        "mixer": "mha(score_scale=1.0)",
        "ffn": ffn,
        "position": format_spec("t5", position),
        "norm": "rmsnorm",
        "embed": "text_encoder",
    }


# Those of Stable Diffusion 3 and Wan 2.1, by the name of their size.
PUBLISHED = {
    "clip_l": clip("gelu(kind='quick')", 77, projection=768, skip=1),
    "clip_bigg": clip("gelu(kind='erf')", 77, projection=1280, skip=1),
    "t5_xxl": t5("geglu(kind='tanh')", shared=True),
    "umt5_xxl": t5("geglu(kind='tanh')", shared=False),
}


def build_published(name: str, **changes: typing.Any) -> TextEncoder:
    """Builds an encoder of PUBLISHED; `changes` override `config.model`: precision, scan, remat, attention_kernel."""
    model = from_config.complete_model({"size": name} | PUBLISHED[name] | changes)
    encoder: typing.Any = from_config.from_config(model)
    return encoder
