"""Tensor name tables of checkpoint families: `{name in the file: (parameters of this package in it, layout)}`.

`{layer}` stands for a layer's number, and the paths are then relative to a block. Where a layer of the file is a group
of several blocks here, they begin with `block_0/` and so on. `{expert}` stands for an expert's number (experts are
stacked here). Entries that a model does not have (a bias, a router) are skipped. `layouts` defines the layouts.
"""

from efficientllm.convert.tensors.table_entries import linear, norm, plain, swiglu, within

_TOP = plain("model.embed_tokens.weight", "embedding") | norm("model.norm", "norm") | linear("lm_head", "head")
_NORMS = norm("input_layernorm", "mixer_norm") | norm("post_attention_layernorm", "ffn_norm")
_OUTPUT = linear("self_attn.o_proj", "mixer/o")
_ATTENTION = (
    linear("self_attn.q_proj", "mixer/q")
    | linear("self_attn.k_proj", "mixer/k")
    | linear("self_attn.v_proj", "mixer/v")
    | _OUTPUT
    | norm("self_attn.q_norm", "mixer/q_norm")
    | norm("self_attn.k_norm", "mixer/k_norm")
)
_LATENT = (
    linear("self_attn.q_proj", "mixer/q")
    | linear("self_attn.q_a_proj", "mixer/q_a")
    | norm("self_attn.q_a_layernorm", "mixer/q_norm")
    | linear("self_attn.q_b_proj", "mixer/q_b")
    | linear("self_attn.kv_a_proj_with_mqa", "mixer/kv_a")
    | norm("self_attn.kv_a_layernorm", "mixer/kv_norm")
    | linear("self_attn.kv_b_proj", "mixer/kv_b")
    | _OUTPUT
)
_DENSE = swiglu("mlp.", "ffn")
_EXPERTS = linear("mlp.gate", "ffn/router") | swiglu("mlp.experts.{expert}.", "ffn/experts")

LLAMA = _TOP | within("model.layers.{layer}.", _NORMS, _ATTENTION, _DENSE)
PHI3 = _TOP | within(
    "model.layers.{layer}.",
    _NORMS,
    linear("self_attn.qkv_proj", "mixer/q", "mixer/k", "mixer/v"),
    _OUTPUT,
    linear("mlp.gate_up_proj", "ffn/gate", "ffn/up"),
    linear("mlp.down_proj", "ffn/down"),
)
MIXTRAL = _TOP | within(
    "model.layers.{layer}.",
    _NORMS,
    _ATTENTION,
    linear("block_sparse_moe.gate", "ffn/router"),
    swiglu("block_sparse_moe.experts.{expert}.", "ffn/experts", ("w1", "w3", "w2")),
)
QWEN_MOE = _TOP | within(
    "model.layers.{layer}.",
    _NORMS,
    _ATTENTION,
    _DENSE,
    _EXPERTS,
    swiglu("mlp.shared_expert.", "ffn/shared"),
    linear("mlp.shared_expert_gate", "ffn/shared_gate"),
)
DEEPSEEK = _TOP | within(
    "model.layers.{layer}.",
    _NORMS,
    _LATENT,
    _DENSE,
    _EXPERTS,
    plain("mlp.gate.e_score_correction_bias", "ffn/router/bias"),
    swiglu("mlp.shared_experts.", "ffn/shared"),
)
GPT_NEOX = (
    plain("gpt_neox.embed_in.weight", "embedding")
    | norm("gpt_neox.final_layer_norm", "norm")
    | linear("embed_out", "head")
    | within(
        "gpt_neox.layers.{layer}.",
        norm("input_layernorm", "mixer_norm"),
        norm("post_attention_layernorm", "ffn_norm"),
        linear("attention.query_key_value", "mixer/q", "mixer/k", "mixer/v", layout="per_head"),
        linear("attention.dense", "mixer/o"),
        linear("mlp.dense_h_to_4h", "ffn/up"),
        linear("mlp.dense_4h_to_h", "ffn/down"),
    )
)
_BACKBONE = (
    plain("backbone.embeddings.weight", "embedding") | norm("backbone.norm_f", "norm") | linear("lm_head", "head")
)
MAMBA = _BACKBONE | within(
    "backbone.layers.{layer}.",
    norm("norm", "mixer_norm"),
    linear("mixer.in_proj", "mixer/x", "mixer/gate"),
    {"mixer.conv1d.weight": (("mixer/conv/taps",), "taps")},
    plain("mixer.conv1d.bias", "mixer/conv/bias"),
    linear("mixer.x_proj", "mixer/select"),
    {"mixer.dt_proj.weight": (("mixer/step/kernel",), "rows")},
    plain("mixer.dt_proj.bias", "mixer/step_bias"),
    plain("mixer.A_log", "mixer/A_log"),
    plain("mixer.D", "mixer/skip"),
    linear("mixer.out_proj", "mixer/o"),
)
MAMBA2 = _BACKBONE | within(
    "backbone.layers.{layer}.",
    norm("norm", "mixer_norm"),
    linear("mixer.in_proj", "mixer/gate", "mixer/x", "mixer/bc", "mixer/step"),
    {"mixer.conv1d.weight": (("mixer/conv_x/taps", "mixer/conv_bc/taps"), "taps")},
    {"mixer.conv1d.bias": (("mixer/conv_x/bias", "mixer/conv_bc/bias"), "rows")},
    plain("mixer.dt_bias", "mixer/step_bias"),
    plain("mixer.A_log", "mixer/A_log"),
    plain("mixer.D", "mixer/skip"),
    plain("mixer.norm.weight", "mixer/scale"),
    linear("mixer.out_proj", "mixer/o"),
)

# Text encoders. T5's first layer has the table of distances that all layers share.
CLIP = (
    plain("text_model.embeddings.token_embedding.weight", "embedding")
    | plain("text_model.embeddings.position_embedding.weight", "position/table")
    | norm("text_model.final_layer_norm", "norm")
    | linear("text_projection", "projection")
    | within(
        "text_model.encoder.layers.{layer}.",
        norm("layer_norm1", "mixer_norm"),
        norm("layer_norm2", "ffn_norm"),
        linear("self_attn.q_proj", "mixer/q"),
        linear("self_attn.k_proj", "mixer/k"),
        linear("self_attn.v_proj", "mixer/v"),
        linear("self_attn.out_proj", "mixer/o"),
        linear("mlp.fc1", "ffn/up"),
        linear("mlp.fc2", "ffn/down"),
    )
)
_DISTANCES = "SelfAttention.relative_attention_bias.weight"
_T5 = (
    plain("shared.weight", "embedding")
    | norm("encoder.final_layer_norm", "norm")
    | within(
        "encoder.block.{layer}.layer.",
        norm("0.layer_norm", "mixer_norm"),
        norm("1.layer_norm", "ffn_norm"),
        {f"0.SelfAttention.{name}.weight": ((f"mixer/{name}/kernel",), "rows") for name in "qkvo"},
        swiglu("1.DenseReluDense.", "ffn", ("wi_0", "wi_1", "wo")),
    )
)
T5 = _T5 | {f"encoder.block.0.layer.0.{_DISTANCES}": (("position/table",), "rows")}
UMT5 = _T5 | {f"encoder.block.{{layer}}.layer.0.{_DISTANCES}": (("mixer/position/table",), "rows")}

# llama.cpp's names in GGUF files. Only Llama's queries and keys are stored in interleaved rotary order.
_GGUF_TOP = plain("token_embd.weight", "embedding") | norm("output_norm", "norm") | linear("output", "head")
_GGUF_REST = (
    norm("attn_norm", "mixer_norm")
    | norm("ffn_norm", "ffn_norm")
    | linear("attn_v", "mixer/v")
    | linear("attn_output", "mixer/o")
    | norm("attn_q_norm", "mixer/q_norm")
    | norm("attn_k_norm", "mixer/k_norm")
    | swiglu("", "ffn", ("ffn_gate", "ffn_up", "ffn_down"))
)
GGUF_LLAMA = _GGUF_TOP | within(
    "blk.{layer}.",
    linear("attn_q", "mixer/q", layout="query_pairs"),
    linear("attn_k", "mixer/k", layout="key_pairs"),
    _GGUF_REST,
)
GGUF_QWEN = _GGUF_TOP | within("blk.{layer}.", linear("attn_q", "mixer/q"), linear("attn_k", "mixer/k"), _GGUF_REST)
