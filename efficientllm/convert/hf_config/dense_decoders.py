"""Dense decoder families (Llama, Mistral, Phi-3, Qwen, GPT-NeoX): from config.json keys to `config.model`."""

import typing

from efficientllm.convert.hf_config import rope_parameters
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.registry import format_spec, parse_spec


def shape_of(keys: CheckedKeys, *, grouped: bool = True, eps: str = "rms_norm_eps") -> dict[str, typing.Any]:
    """The size fields that all attention decoders share."""
    dim, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    return {
        "num_layers": keys.number("num_hidden_layers"),
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": keys.number("num_key_value_heads", default=heads) if grouped else heads,
        "head_dim": keys.number("head_dim", default=dim // heads),
        "hidden": keys.number("intermediate_size"),
        "norm_eps": keys.number(eps, kind=float),
        "vocab_size": keys.number("vocab_size"),
    }


def silu_only(keys: CheckedKeys) -> None:
    keys.expect("hidden_act", "silu", "swish", because="the ffn of this family is swiglu, with silu")


def decoder(
    keys: CheckedKeys,
    max_positions: int | None,
    *,
    bias: tuple[bool, bool] | None = None,
    qk_norm: bool = False,
    window: str | None = "sliding_window",
    **position,
) -> dict[str, typing.Any]:
    """Llama-like decoder: grouped queries, swiglu, rotary positions, RMS norms.

    Args:
      bias: `(q, k and v have a bias, o has one)`; None reads attention_bias for both.
      window: the key of a sliding window of all layers; None: the family has none.
    """
    shape = shape_of(keys)
    silu_only(keys)
    keys.expect("mlp_bias", False, because="biases of its ffn are not converted")
    base, position_spec = rope_parameters.read_position(keys, max_positions, **position)
    if bias is None:
        bias = (keys.take("attention_bias", default=False),) * 2
    fields = {"qkv_bias": bias[0], "o_bias": bias[1], "qk_norm": qk_norm}
    reach = keys.take(window, default=None) if window else None
    return {
        "size": format_spec("custom", shape | {"rope_base": base}),
        "mixer": _attention(fields, reach),
        "position": position_spec,
    }


def _attention(fields, window=None):
    fields = {key: value for key, value in fields.items() if value}
    return format_spec("window", fields | {"window": window}) if window else format_spec("gqa", fields)


def llama(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    return decoder(keys, max_positions, window=None)


def mistral(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    model = decoder(keys, max_positions, bias=(False, False))
    kind = "sliding_attention" if parse_spec(model["mixer"])[0] == "window" else "full_attention"
    types = keys.take("layer_types", default=[kind])  # which the class does not read
    if set(types) != {kind}:
        raise keys.refusal("layer_types", types, "all layers of this family have the one sliding_window, or none")
    return model


def phi3(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    aliases = (("su", "longrope"), ("yarn", "longrope"))
    return decoder(keys, max_positions, bias=(False, False), fraction=1.0, aliases=aliases)


def qwen2(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    return _some_windows(keys, decoder(keys, max_positions, bias=(True, False), window=None))


def qwen3(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    return _some_windows(keys, decoder(keys, max_positions, qk_norm=True, window=None))


def _some_windows(keys, model):
    """Sets the window of layers from max_window_layers on, or of those in layer_types, if use_sliding_window is set."""
    window, on = keys.take("sliding_window", default=None), keys.take("use_sliding_window", default=False)
    first, types = keys.take("max_window_layers"), keys.take("layer_types", default=None)
    depth = spec_fields(model["size"])["num_layers"]
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    types = types or (default if on and window else ["full_attention"] * depth)
    if len(types) != depth:
        raise keys.refusal("layer_types", types, f"there are {depth} layers")
    mixers = {"full_attention": model["mixer"]}
    if on and window:
        mixers["sliding_attention"] = _attention(spec_fields(model["mixer"]), window)
    for kind in types:
        if kind not in mixers:
            raise keys.refusal("layer_types", kind, f"known here: {', '.join(mixers)}")
    return model | {"pattern": tuple(f"{mixers[kind]} | swiglu" for kind in types)}


def spec_fields(text: str) -> dict[str, typing.Any]:
    """The fields of a spec string."""
    return parse_spec(text)[1]


def gpt_neox(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    shape = shape_of(keys, grouped=False, eps="layer_norm_eps")
    keys.expect("hidden_act", "gelu", because="only the exact GELU (erf) is converted")
    bias = keys.take("attention_bias")
    base, position_spec = rope_parameters.read_position(
        keys, max_positions, fraction=0.25, names=("rotary_emb_base", "rotary_pct")
    )
    return {
        "size": format_spec("custom", shape | {"rope_base": base}),
        "mixer": _attention({"qkv_bias": bias, "o_bias": bias}),
        "ffn": "gelu",
        "position": position_spec,
        "norm": "layernorm",
        "residual": "parallel" if keys.take("use_parallel_residual") else "sequential",
    }
