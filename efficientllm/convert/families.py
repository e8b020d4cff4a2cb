"""Families of checkpoints: what a config.json means in our words, and which table names its tensors.

A description is the overrides of `config.model` that make the model of the config.json. A key that would change a logit
is honoured or refused by name (`keys.Keys`).
"""

import dataclasses
import typing

from efficientllm.convert import rope, tables
from efficientllm.convert.keys import Keys
from efficientllm.convert.rope import spec
from efficientllm.errors import UserError, did_you_mean

_BUFFERS = (r"rotary_emb\.inv_freq$",)


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    Args:
      architecture: the class that loads it there.
      describe: from `Keys` and max_positions to the overrides of `config.model`, its specs and its size.
      table: names of its tensors (`tables`).
      ignored: tensors that older files carry and no model needs, as regular expressions.
    """

    architecture: str
    describe: typing.Callable
    table: dict
    ignored: tuple = _BUFFERS


@dataclasses.dataclass(frozen=True)
class Description:
    """What a config.json says: `model`, overrides of `config.model`; the most positions that it names."""

    model: dict
    max_positions: int
    model_type: str


def describe(config, where):
    """The Description of a config.json, a dict. Raises UserError naming the key that ours cannot honour."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type = {model_type!r} is none of {', '.join(FAMILIES)}"
            f"{did_you_mean(str(model_type), FAMILIES)}"
        )
    keys = Keys(config, where)
    keys.expect("is_encoder_decoder", False, because="ours is a decoder")
    max_positions = keys.number("max_position_embeddings", default=None)
    family = FAMILIES[model_type]
    for name in config.get("architectures") or ():
        if name != family.architecture:
            raise keys.refusal("architectures", [name], f"only {family.architecture} of this family is")
    model = family.describe(keys, max_positions)
    model["tied"] = keys.take("tie_word_embeddings", default=model["tied"])
    keys.finish()
    return Description(_complete(model), max_positions, model_type)


def _complete(model):
    """Every key of `config.model` that says what the model is, so that none keeps another config's value."""
    plain = {"ffn": "swiglu", "residual": "sequential", "norm": "rmsnorm", "embed_norm": False, "pattern": ()}
    found = plain | model | {"parameters_of": ""}
    pattern = _period(found["pattern"])
    if len(pattern) == 1:
        mixer, _, ffn = pattern[0].partition("|")
        found |= {"mixer": mixer.strip(), "ffn": ffn.strip() or found["ffn"]}
    return found | {"pattern": pattern if len(pattern) > 1 else ()}


def _period(layers):
    """The shortest pattern that repeated makes all layers."""
    for length in range(1, len(layers) + 1):
        if len(layers) % length == 0 and layers == layers[:length] * (len(layers) // length):
            return layers[:length]
    return layers


def _shape(keys, *, kv_default=True, eps="rms_norm_eps", eps_default=1e-6):
    """The fields of a size that all decoders of attention share."""
    dim, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    return {
        "num_layers": keys.number("num_hidden_layers"),
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": keys.number("num_key_value_heads", default=heads) if kv_default else heads,
        "head_dim": keys.number("head_dim", default=dim // heads),
        "hidden": keys.number("intermediate_size"),
        "norm_eps": keys.number(eps, kind=float, default=eps_default),
        "vocab_size": keys.number("vocab_size"),
    }


def _silu(keys):
    keys.expect("hidden_act", "silu", "swish", because="the ffn of this family is swiglu, with silu")


def _decoder(keys, max_positions, *, bias=None, qk_norm=False, window="sliding_window", **position):
    """Llama and its kin: grouped queries, swiglu, rotary positions, RMS norms.

    Args:
      bias: `(q, k and v have one, o has one)`; None asks the key attention_bias about both.
      window: the key of a window that all layers have; None: the family has none.
    """
    shape = _shape(keys)
    _silu(keys)
    keys.expect("mlp_bias", False, because="swiglu of ours has no bias")
    base, position_spec = rope.position(keys, max_positions, **position)
    if bias is None:
        bias = (keys.take("attention_bias", default=False),) * 2
    fields = {"qkv_bias": bias[0], "o_bias": bias[1], "qk_norm": qk_norm}
    reach = keys.take(window, default=None) if window else None
    return {
        "size": spec("custom", shape | {"rope_base": base}),
        "mixer": _attention(fields, reach),
        "position": position_spec,
        "tied": False,
    }


def _attention(fields, window=None):
    fields = {key: value for key, value in fields.items() if value}
    return spec("window", fields | {"window": window}) if window else spec("gqa", fields)


def _llama(keys, max_positions):
    return _decoder(keys, max_positions, window=None)


def _mistral(keys, max_positions):
    return _decoder(keys, max_positions, bias=(False, False))


def _phi3(keys, max_positions):
    aliases = (("su", "longrope"), ("yarn", "longrope"))
    return _decoder(keys, max_positions, bias=(False, False), fraction=1.0, aliases=aliases)


def _qwen2(keys, max_positions):
    return _some_windows(keys, _decoder(keys, max_positions, bias=(True, False), window=None))


def _qwen3(keys, max_positions):
    return _some_windows(keys, _decoder(keys, max_positions, qk_norm=True, window=None))


def _some_windows(keys, model):
    """Layers from max_window_layers on have a window, or those that layer_types names; without use_sliding_window,
    none."""
    window, on = keys.take("sliding_window", default=None), keys.take("use_sliding_window", default=False)
    first, types = keys.take("max_window_layers", default=28), keys.take("layer_types", default=None)
    depth = _fields(model["size"])["num_layers"]
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    types = types or (default if on and window else ["full_attention"] * depth)
    if len(types) != depth:
        raise keys.refusal("layer_types", types, f"there are {depth} layers")
    mixers = {"full_attention": model["mixer"]}
    if on and window:
        mixers["sliding_attention"] = _attention(_fields(model["mixer"]), window)
    for kind in types:
        if kind not in mixers:
            raise keys.refusal("layer_types", kind, f"known here: {', '.join(mixers)}")
    return model | {"pattern": tuple(f"{mixers[kind]} | swiglu" for kind in types)}


def _fields(text):
    from efficientllm.registry import parse

    return parse(text)[1]


def _mixtral(keys, max_positions):
    model = _decoder(keys, max_positions, bias=(False, False), base=1e6)
    moe = {
        "num_experts": keys.number("num_local_experts"),
        "top_k": keys.number("num_experts_per_tok"),
        "hidden": _fields(model["size"])["hidden"],
    }
    return model | {"ffn": spec("moe", moe)}


def _qwen2_moe(keys, max_positions):
    keys.expect("use_sliding_window", False, because="windows of some layers are not, in this family")
    for name in ("sliding_window", "max_window_layers", "layer_types"):
        keys.take(name, default=None)
    bias = keys.take("qkv_bias", default=True)
    model = _decoder(keys, max_positions, bias=(bias, False), window=None)
    shared = {"shared_hidden": keys.number("shared_expert_intermediate_size"), "shared_gate": True}
    return _sparse_layers(keys, model, _qwen_experts(keys) | shared)


def _qwen3_moe(keys, max_positions):
    if not keys.take("use_sliding_window", default=False):
        keys.take("sliding_window", default=None)
    keys.take("max_window_layers", default=None)
    model = _decoder(keys, max_positions, qk_norm=True)
    return _sparse_layers(keys, model, _qwen_experts(keys))


def _qwen_experts(keys):
    return {
        "num_experts": keys.number("num_experts", "num_local_experts"),
        "top_k": keys.number("num_experts_per_tok"),
        "hidden": keys.number("moe_intermediate_size"),
        "normalise": bool(keys.take("norm_topk_prob", default=False)),
    }


def _sparse_layers(keys, model, moe):
    """Every decoder_sparse_step-th layer has experts but those of mlp_only_layers, which are dense."""
    step, dense = keys.take("decoder_sparse_step", default=1), set(keys.take("mlp_only_layers", default=()))
    depth = _fields(model["size"])["num_layers"]
    sparse = [i not in dense and step > 0 and (i + 1) % step == 0 for i in range(depth)]
    return _dense_and_sparse(model, sparse, moe)


def _dense_and_sparse(model, sparse, moe):
    ffns = (spec("moe", moe) if is_sparse else "swiglu" for is_sparse in sparse)
    return model | {"pattern": tuple(f"{model['mixer']} | {ffn}" for ffn in ffns)}


def _deepseek(keys, max_positions):
    """What V2 and V3 share but the router: latent attention, and experts after some dense layers."""
    keys.expect("attention_bias", False, because="mla of ours has no bias")
    keys.expect("mlp_bias", False, because="swiglu of ours has no bias")
    keys.expect("moe_layer_freq", 1, because="every layer after the dense ones has experts")
    _silu(keys)
    keys.take("head_dim", default=None)  # the rotated part's width once more
    shape = _shape(keys) | {"head_dim": keys.number("qk_nope_head_dim")}
    interleaved = keys.take("rope_interleave", default=True)
    base, position_spec = rope.position(keys, max_positions, interleaved=interleaved)
    latent = {
        "kv_rank": keys.number("kv_lora_rank"),
        "q_rank": keys.number("q_lora_rank", default=None),
        "rope_dim": keys.number("qk_rope_head_dim"),
        "v_dim": keys.number("v_head_dim"),
    }
    width = shape["head_dim"] + latent["rope_dim"]
    keys.expect("qk_head_dim", width, because=f"qk_nope_head_dim and qk_rope_head_dim make {width}")
    model = {
        "size": spec("custom", shape | {"rope_base": base}),
        "mixer": spec("mla", {key: value for key, value in latent.items() if value}),
        "position": position_spec,
        "tied": False,
    }
    hidden = keys.number("moe_intermediate_size")
    moe = {
        "num_experts": keys.number("n_routed_experts", "num_local_experts", "num_experts"),
        "top_k": keys.number("num_experts_per_tok"),
        "hidden": hidden,
        "scale": float(keys.take("routed_scaling_factor", default=1.0)),
        "shared_hidden": hidden * (keys.take("n_shared_experts", default=0) or 0),
    }
    first = keys.take("first_k_dense_replace", default=0)
    return model, [i >= first for i in range(shape["num_layers"])], moe


def _groups(keys):
    groups, chosen = keys.take("n_group", default=1), keys.take("topk_group", default=1)
    return {"groups": groups, "top_groups": chosen} if groups > 1 else {}


def _deepseek_v2(keys, max_positions):
    model, sparse, moe = _deepseek(keys, max_positions)
    method = keys.take("topk_method", default="greedy")
    groups = _groups(keys)
    if method not in ("greedy", "group_limited_greedy"):
        raise keys.refusal("topk_method", method, "known here: greedy, group_limited_greedy")
    keys.expect("scoring_func", "softmax", because="V2 routes by softmax")
    keys.expect("norm_topk_prob", False, because="transformers' DeepSeek-V2 does not normalise the experts' weights")
    limited = groups if method == "group_limited_greedy" else {}
    return _dense_and_sparse(model, sparse, moe | {"normalise": False} | limited)


def _deepseek_v3(keys, max_positions):
    model, sparse, moe = _deepseek(keys, max_positions)
    keys.expect("topk_method", "noaux_tc", because="V3 routes by biased scores (noaux_tc)")
    keys.expect("scoring_func", "sigmoid", because="V3 routes by sigmoid")
    moe |= {"normalise": bool(keys.take("norm_topk_prob", default=True)), "scores": "sigmoid", "bias_rate": 0.001}
    return _dense_and_sparse(model, sparse, moe | _groups(keys))


def _gpt_neox(keys, max_positions):
    shape = _shape(keys, kv_default=False, eps="layer_norm_eps", eps_default=1e-5)
    keys.expect("hidden_act", "gelu", because="gelu of ours is exact (erf)")
    bias = keys.take("attention_bias", default=True)
    base, position_spec = rope.position(keys, max_positions, fraction=0.25)
    return {
        "size": spec("custom", shape | {"rope_base": base}),
        "mixer": _attention({"qkv_bias": bias, "o_bias": bias}),
        "ffn": "gelu",
        "position": position_spec,
        "norm": "layernorm",
        "residual": "parallel" if keys.take("use_parallel_residual", default=True) else "sequential",
        "tied": False,
    }


def _mamba(keys, max_positions):
    size, fields = _state_space(keys)
    fields["step_rank"] = _auto(keys.take("time_step_rank", default="auto"), -(-_fields(size)["dim"] // 16))
    return _stack(size, spec("mamba", fields), tied=True)


def _mamba2(keys, max_positions):
    size, fields = _state_space(keys)
    fields |= {"ssm_head_dim": keys.number("head_dim"), "num_groups": keys.number("n_groups")}
    heads, inner = keys.number("num_heads"), fields["inner"]
    if heads * fields["ssm_head_dim"] != inner:
        raise keys.refusal("num_heads", heads, f"heads of {fields['ssm_head_dim']} make {inner} channels")
    for name in ("chunk_size", "time_step_rank"):  # how it is computed, and a width that nothing has
        keys.take(name, default=None)
    limit = keys.take("time_step_limit", default=_UNBOUNDED[0])
    if list(limit) not in _UNBOUNDED:
        raise keys.refusal("time_step_limit", limit, "steps of ours have no bounds")
    keys.expect("norm_before_gate", False, because="mamba2 of ours gates before its norm")
    return _stack(size, spec("mamba2", fields), tied=False)


_UNBOUNDED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # as JSON has it, and as transformers writes it


def _state_space(keys):
    """`(size, fields)` that both Mambas have. A block without an ffn is half a layer of ours."""
    keys.expect("hidden_act", "silu", because="mamba of ours has silu")
    dim, blocks = keys.number("hidden_size"), keys.number("num_hidden_layers")
    if blocks % 2:
        raise keys.refusal("num_hidden_layers", blocks, "ours counts two blocks without an ffn as a layer")
    expand = keys.take("expand", default=2)
    fields = {
        "inner": keys.number("intermediate_size", default=int(expand * dim)),
        "state_dim": keys.number("state_size"),
        "conv": keys.number("conv_kernel"),
        "use_bias": keys.take("use_bias", default=False),
        "conv_bias": keys.take("use_conv_bias", default=True),
    }
    shape = {"num_layers": blocks // 2, "dim": dim, "vocab_size": keys.number("vocab_size")}
    shape["norm_eps"] = keys.number("layer_norm_epsilon", kind=float, default=1e-5)
    shape |= {"num_heads": 1, "num_kv_heads": 1, "head_dim": dim, "hidden": dim, "rope_base": 1e4}
    return spec("custom", shape), fields


def _auto(value, derived):
    return derived if value == "auto" else value


def _stack(size, mixer, tied):
    return {"size": size, "mixer": mixer, "ffn": "none", "position": "none", "tied": tied}


_NEOX_BUFFERS = (*_BUFFERS, r"attention\.bias$", r"attention\.masked_bias$")
# Layers behind the last are DeepSeek-V3's prediction of further tokens, which no class of transformers loads.
_FURTHER_TOKENS = (*_BUFFERS, r"^model\.layers\.61\.")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, tables.LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, tables.LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, tables.LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, tables.LLAMA),
    "phi3": Family("Phi3ForCausalLM", _phi3, tables.PHI3),
    "mixtral": Family("MixtralForCausalLM", _mixtral, tables.MIXTRAL),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, tables.QWEN_MOE),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, tables.QWEN_MOE),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, tables.DEEPSEEK),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, tables.DEEPSEEK, _FURTHER_TOKENS),
    "gpt_neox": Family("GPTNeoXForCausalLM", _gpt_neox, tables.GPT_NEOX, _NEOX_BUFFERS),
    "mamba": Family("MambaForCausalLM", _mamba, tables.MAMBA),
    "mamba2": Family("Mamba2ForCausalLM", _mamba2, tables.MAMBA2),
}
