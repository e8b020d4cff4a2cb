"""Text encoders (CLIP, T5 v1.1, UMT5): from the keys of a config.json to `config.model`, and back."""

import typing

from efficientllm.architecture import text_encoders
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.embeds.text_encoder import LARGEST, TextEncoder
from efficientllm.errors import UserError
from efficientllm.registry import format_spec, parse_spec

CLIP, T5, UMT5 = "clip_text_model", "t5", "umt5"
PROJECTED = "CLIPTextModelWithProjection"
_CLIP_KINDS = {"quick_gelu": "quick", "gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_T5_FFNS = {"gelu_new": "geglu(kind='tanh')", "gelu": "geglu(kind='erf')", "silu": "swiglu"}
_FIRST_FILES_END = 2  # in CLIP's first files, whose end token has another id: the largest of a row is taken


def clip(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """CLIPTextModel and CLIPTextModelWithProjection of transformers."""
    dim, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    if dim % heads:
        raise UserError(f"{keys.where}: num_attention_heads = {heads} does not divide hidden_size = {dim}")
    projection = keys.number("projection_dim")
    is_projected = _architecture(keys, "CLIPTextModel", PROJECTED) == PROJECTED
    end_id = keys.take("eos_token_id")
    if not isinstance(end_id, int) or end_id < 0:
        raise keys.refusal("eos_token_id", end_id, "the vector of a text is taken at one token")
    model = text_encoders.clip(
        format_spec("gelu", {"kind": _choice(keys, "hidden_act", _CLIP_KINDS)}),
        keys.number("max_position_embeddings"),
        LARGEST if end_id == _FIRST_FILES_END else end_id,
        projection if is_projected else 0,
    )
    eps = keys.number("layer_norm_eps", kind=float)
    hidden, layers = keys.number("intermediate_size"), keys.number("num_hidden_layers")
    return model | {"size": _size(keys, layers, dim, heads, dim // heads, hidden, eps)}


def t5(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """T5EncoderModel of transformers; T5 v1.1's ffn is gated, that of the first T5 is not."""
    return _t5(keys, "T5EncoderModel", shared=True)


def umt5(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    """UMT5EncoderModel of transformers."""
    return _t5(keys, "UMT5EncoderModel", shared=False)


def _t5(keys, architecture, shared):
    _architecture(keys, architecture)
    projections = keys.take("feed_forward_proj")
    gate, _, activation = projections.partition("-")
    if gate != "gated" or activation not in ("gelu", "gelu_new", "silu"):
        raise keys.refusal("feed_forward_proj", projections, "known are gated-gelu and gated-silu")
    # In transformers gated-gelu is the approximation, unless the file has the other key too.
    ffn = _choice(keys, "dense_act_fn", _T5_FFNS, "gelu_new" if activation == "gelu" else activation)
    keys.expect("is_gated_act", True, because="the ffn of these encoders is gated")
    for name in ("num_decoder_layers", "scale_decoder_outputs", "tie_word_embeddings"):
        keys.take(name, default=None)  # of the decoder
    buckets = keys.number("relative_attention_num_buckets")
    model = text_encoders.t5(ffn, shared, buckets, keys.number("relative_attention_max_distance"))
    dim, heads, head_dim = keys.number("d_model"), keys.number("num_heads"), keys.number("d_kv")
    eps, hidden = keys.number("layer_norm_epsilon", kind=float), keys.number("d_ff")
    return model | {"size": _size(keys, keys.number("num_layers"), dim, heads, head_dim, hidden, eps)}


def _architecture(keys, *known):
    """Takes the class, the first of `known` if the file names none."""
    names = keys.take("architectures", default=[known[0]])
    if len(names) != 1 or names[0] not in known:
        raise keys.refusal("architectures", names, f"known of this family are {', '.join(known)}")
    return names[0]


def _choice(keys, name, choices, default=None):
    value = keys.take(name, default=default)
    if value not in choices:
        raise keys.refusal(name, value, f"known are {', '.join(choices)}")
    return choices[value]


def _size(keys, layers, dim, heads, head_dim, hidden, eps):
    fields = {"num_layers": layers, "dim": dim, "num_heads": heads, "num_kv_heads": heads, "head_dim": head_dim}
    fields |= {"hidden": hidden, "rope_base": 1e4, "norm_eps": eps, "vocab_size": keys.number("vocab_size")}
    return format_spec("custom", fields)


def config_of(model_type: str, encoder: TextEncoder, facts: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """A config.json (a dict) of `model_type` with the `facts` (`canonical`) of an encoder."""
    (mixer, ffn), *_ = facts["layers"]
    position, fields = mixer["position"]
    config = {"model_type": model_type, "vocab_size": encoder.vocab_size}
    eps = parse_spec(encoder.norm)[1]["eps"]
    if model_type == CLIP:
        kinds = {kind: name for name, kind in reversed(_CLIP_KINDS.items())}
        config |= {"architectures": [PROJECTED if encoder.projection else "CLIPTextModel"]}
        config |= {"hidden_size": encoder.dim, "intermediate_size": ffn["hidden"], "layer_norm_eps": eps}
        config |= {"num_hidden_layers": encoder.num_layers, "num_attention_heads": mixer["num_heads"]}
        config |= {"max_position_embeddings": fields.get("max_length"), "hidden_act": kinds.get(ffn.get("kind"))}
        config |= {"projection_dim": encoder.projection or encoder.dim}
        return config | {"eos_token_id": _FIRST_FILES_END if encoder.end_id == LARGEST else encoder.end_id}
    gated = {"geglu": "gated-gelu", "swiglu": "gated-silu"}
    config |= {"architectures": ["T5EncoderModel" if model_type == T5 else "UMT5EncoderModel"]}
    config |= {"d_model": encoder.dim, "d_ff": ffn["hidden"], "d_kv": mixer["head_dim"], "layer_norm_epsilon": eps}
    config |= {"num_layers": encoder.num_layers, "num_heads": mixer["num_heads"]}
    config |= {"feed_forward_proj": gated.get(ffn["ffn"])}
    if ffn.get("kind") == "erf":
        config["dense_act_fn"] = "gelu"
    config |= {f"relative_attention_{name}": fields.get(name) for name in ("num_buckets", "max_distance")}
    return config | {"is_encoder_decoder": False}
