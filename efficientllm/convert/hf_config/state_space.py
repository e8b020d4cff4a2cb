"""State-space families (Mamba, Mamba-2): from config.json keys to `config.model`."""

import typing

from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.hf_config.dense_decoders import spec_fields
from efficientllm.registry import format_spec


def mamba(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    size, fields = _state_space(keys)
    fields["step_rank"] = _auto(keys.take("time_step_rank"), -(-spec_fields(size)["dim"] // 16))
    return _stack(size, format_spec("mamba", fields))


def mamba2(keys: CheckedKeys, max_positions: int | None) -> dict[str, typing.Any]:
    size, fields = _state_space(keys)
    fields |= {"ssm_head_dim": keys.number("head_dim"), "num_groups": keys.number("n_groups")}
    heads, inner = keys.number("num_heads"), fields["inner"]
    if heads * fields["ssm_head_dim"] != inner:
        raise keys.refusal("num_heads", heads, f"heads of {fields['ssm_head_dim']} make {inner} channels")
    for name in ("chunk_size", "time_step_rank"):  # a choice of algorithm, and a width that Mamba-2 does not use
        keys.take(name, default=None)
    limit = keys.take("time_step_limit")
    if list(limit) not in _UNBOUNDED:
        raise keys.refusal("time_step_limit", limit, "steps have no bounds here")
    return _stack(size, format_spec("mamba2", fields))


_UNBOUNDED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # in JSON, and as transformers writes it


def _state_space(keys):
    """`(size, fields)` of both Mambas. Two of their blocks, which have no ffn, count as one of our layers."""
    keys.expect("hidden_act", "silu", because="mamba has silu here")
    dim, blocks = keys.number("hidden_size"), keys.number("num_hidden_layers")
    if blocks % 2:
        raise keys.refusal("num_hidden_layers", blocks, "two blocks without an ffn count as a layer here")
    expand = keys.take("expand")
    fields = {
        "inner": keys.number("intermediate_size", default=int(expand * dim)),
        "state_dim": keys.number("state_size"),
        "conv": keys.number("conv_kernel"),
        "use_bias": keys.take("use_bias"),
        "conv_bias": keys.take("use_conv_bias"),
    }
    shape = {"num_layers": blocks // 2, "dim": dim, "vocab_size": keys.number("vocab_size")}
    shape["norm_eps"] = keys.number("layer_norm_epsilon", kind=float)
    shape |= {"num_heads": 1, "num_kv_heads": 1, "head_dim": dim, "hidden": dim, "rope_base": 1e4}
    return format_spec("custom", shape), fields


def _auto(value, derived):
    return derived if value == "auto" else value


def _stack(size, mixer):
    return {"size": size, "mixer": mixer, "ffn": "none", "position": "none"}
