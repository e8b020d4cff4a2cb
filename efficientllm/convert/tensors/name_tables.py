"""Tensor name tables of checkpoint families: `{name in the file: (our parameters in it, layout)}`.

`{layer}` stands for a layer's number, and our paths are then relative to a block; `{expert}` for an expert's number (we
stack experts). Entries that a model does not have (a bias, a router) are skipped. `layouts` defines the layouts.
"""


def _linear(disk, *paths, layout="rows"):
    """A linear map: weight and, if the model has it, bias."""
    return {
        f"{disk}.weight": (tuple(f"{path}/kernel" for path in paths), layout),
        f"{disk}.bias": (tuple(f"{path}/bias" for path in paths), layout),
    }


def _norm(disk, path):
    return {f"{disk}.weight": ((f"{path}/scale",), "same"), f"{disk}.bias": ((f"{path}/bias",), "same")}


def _plain(disk, path):
    return {disk: ((path,), "same")}


def _within(prefix, *tables):
    """The tables' entries with `prefix` before their names in the file."""
    return {f"{prefix}{disk}": entry for table in tables for disk, entry in table.items()}


def _swiglu(prefix, path, names=("gate_proj", "up_proj", "down_proj")):
    pairs = zip(names, ("gate", "up", "down"), strict=True)
    return {
        disk: entry for name, kernel in pairs for disk, entry in _linear(f"{prefix}{name}", f"{path}/{kernel}").items()
    }


_TOP = _plain("model.embed_tokens.weight", "embedding") | _norm("model.norm", "norm") | _linear("lm_head", "head")
_NORMS = _norm("input_layernorm", "mixer_norm") | _norm("post_attention_layernorm", "ffn_norm")
_OUTPUT = _linear("self_attn.o_proj", "mixer/o")
_ATTENTION = (
    _linear("self_attn.q_proj", "mixer/q")
    | _linear("self_attn.k_proj", "mixer/k")
    | _linear("self_attn.v_proj", "mixer/v")
    | _OUTPUT
    | _norm("self_attn.q_norm", "mixer/q_norm")
    | _norm("self_attn.k_norm", "mixer/k_norm")
)
_LATENT = (
    _linear("self_attn.q_proj", "mixer/q")
    | _linear("self_attn.q_a_proj", "mixer/q_a")
    | _norm("self_attn.q_a_layernorm", "mixer/q_norm")
    | _linear("self_attn.q_b_proj", "mixer/q_b")
    | _linear("self_attn.kv_a_proj_with_mqa", "mixer/kv_a")
    | _norm("self_attn.kv_a_layernorm", "mixer/kv_norm")
    | _linear("self_attn.kv_b_proj", "mixer/kv_b")
    | _OUTPUT
)
_DENSE = _swiglu("mlp.", "ffn")
_EXPERTS = _linear("mlp.gate", "ffn/router") | _swiglu("mlp.experts.{expert}.", "ffn/experts")

LLAMA = _TOP | _within("model.layers.{layer}.", _NORMS, _ATTENTION, _DENSE)
PHI3 = _TOP | _within(
    "model.layers.{layer}.",
    _NORMS,
    _linear("self_attn.qkv_proj", "mixer/q", "mixer/k", "mixer/v"),
    _OUTPUT,
    _linear("mlp.gate_up_proj", "ffn/gate", "ffn/up"),
    _linear("mlp.down_proj", "ffn/down"),
)
MIXTRAL = _TOP | _within(
    "model.layers.{layer}.",
    _NORMS,
    _ATTENTION,
    _linear("block_sparse_moe.gate", "ffn/router"),
    _swiglu("block_sparse_moe.experts.{expert}.", "ffn/experts", ("w1", "w3", "w2")),
)
QWEN_MOE = _TOP | _within(
    "model.layers.{layer}.",
    _NORMS,
    _ATTENTION,
    _DENSE,
    _EXPERTS,
    _swiglu("mlp.shared_expert.", "ffn/shared"),
    _linear("mlp.shared_expert_gate", "ffn/shared_gate"),
)
DEEPSEEK = _TOP | _within(
    "model.layers.{layer}.",
    _NORMS,
    _LATENT,
    _DENSE,
    _EXPERTS,
    _plain("mlp.gate.e_score_correction_bias", "ffn/router/bias"),
    _swiglu("mlp.shared_experts.", "ffn/shared"),
)
GPT_NEOX = (
    _plain("gpt_neox.embed_in.weight", "embedding")
    | _norm("gpt_neox.final_layer_norm", "norm")
    | _linear("embed_out", "head")
    | _within(
        "gpt_neox.layers.{layer}.",
        _norm("input_layernorm", "mixer_norm"),
        _norm("post_attention_layernorm", "ffn_norm"),
        _linear("attention.query_key_value", "mixer/q", "mixer/k", "mixer/v", layout="per_head"),
        _linear("attention.dense", "mixer/o"),
        _linear("mlp.dense_h_to_4h", "ffn/up"),
        _linear("mlp.dense_4h_to_h", "ffn/down"),
    )
)
_BACKBONE = (
    _plain("backbone.embeddings.weight", "embedding") | _norm("backbone.norm_f", "norm") | _linear("lm_head", "head")
)
MAMBA = _BACKBONE | _within(
    "backbone.layers.{layer}.",
    _norm("norm", "mixer_norm"),
    _linear("mixer.in_proj", "mixer/x", "mixer/gate"),
    {"mixer.conv1d.weight": (("mixer/conv/taps",), "taps")},
    _plain("mixer.conv1d.bias", "mixer/conv/bias"),
    _linear("mixer.x_proj", "mixer/select"),
    {"mixer.dt_proj.weight": (("mixer/step/kernel",), "rows")},
    _plain("mixer.dt_proj.bias", "mixer/step_bias"),
    _plain("mixer.A_log", "mixer/A_log"),
    _plain("mixer.D", "mixer/skip"),
    _linear("mixer.out_proj", "mixer/o"),
)
MAMBA2 = _BACKBONE | _within(
    "backbone.layers.{layer}.",
    _norm("norm", "mixer_norm"),
    _linear("mixer.in_proj", "mixer/gate", "mixer/x", "mixer/bc", "mixer/step"),
    {"mixer.conv1d.weight": (("mixer/conv_x/taps", "mixer/conv_bc/taps"), "taps")},
    {"mixer.conv1d.bias": (("mixer/conv_x/bias", "mixer/conv_bc/bias"), "rows")},
    _plain("mixer.dt_bias", "mixer/step_bias"),
    _plain("mixer.A_log", "mixer/A_log"),
    _plain("mixer.D", "mixer/skip"),
    _plain("mixer.norm.weight", "mixer/scale"),
    _linear("mixer.out_proj", "mixer/o"),
)

# llama.cpp's names in GGUF files. Only Llama's queries and keys are stored in interleaved rotary order.
_GGUF_TOP = _plain("token_embd.weight", "embedding") | _norm("output_norm", "norm") | _linear("output", "head")
_GGUF_REST = (
    _norm("attn_norm", "mixer_norm")
    | _norm("ffn_norm", "ffn_norm")
    | _linear("attn_v", "mixer/v")
    | _linear("attn_output", "mixer/o")
    | _norm("attn_q_norm", "mixer/q_norm")
    | _norm("attn_k_norm", "mixer/k_norm")
    | _swiglu("", "ffn", ("ffn_gate", "ffn_up", "ffn_down"))
)
GGUF_LLAMA = _GGUF_TOP | _within(
    "blk.{layer}.",
    _linear("attn_q", "mixer/q", layout="query_pairs"),
    _linear("attn_k", "mixer/k", layout="key_pairs"),
    _GGUF_REST,
)
GGUF_QWEN = _GGUF_TOP | _within("blk.{layer}.", _linear("attn_q", "mixer/q"), _linear("attn_k", "mixer/k"), _GGUF_REST)
