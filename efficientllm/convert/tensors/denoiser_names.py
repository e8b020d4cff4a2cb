"""Tensor name tables of diffusion models: DiT, Stable Diffusion 3 and Wan 2.1; see `name_tables`."""

from efficientllm.convert.tensors.table_entries import linear, norm, patches, plain, within

# DiT of diffusers. Every block holds a copy of the time embedding and of the label table.
DIT = (
    patches("pos_embed.proj", "patch")
    | linear("proj_out_1", "final/modulation")
    | linear("proj_out_2", "final")
    | within(
        "transformer_blocks.{layer}.",
        linear("norm1.emb.timestep_embedder.linear_1", "time/0"),
        linear("norm1.emb.timestep_embedder.linear_2", "time/2"),
        plain("norm1.emb.class_embedder.embedding_table.weight", "label_table"),
        linear("norm1.linear", "modulation"),
        linear("attn1.to_q", "mixer/q"),
        linear("attn1.to_k", "mixer/k"),
        linear("attn1.to_v", "mixer/v"),
        linear("attn1.to_out.0", "mixer/o"),
        linear("ff.net.0.proj", "ffn/up"),
        linear("ff.net.2", "ffn/down"),
    )
)
# DiT as it was published.
DIT_ORIGINAL = (
    patches("x_embedder.proj", "patch")
    | linear("t_embedder.mlp.0", "time/0")
    | linear("t_embedder.mlp.2", "time/2")
    | plain("y_embedder.embedding_table.weight", "label_table")
    | linear("final_layer.adaLN_modulation.1", "final/modulation")
    | linear("final_layer.linear", "final")
    | within(
        "blocks.{layer}.",
        linear("adaLN_modulation.1", "modulation"),
        linear("attn.qkv", "mixer/q", "mixer/k", "mixer/v"),
        linear("attn.proj", "mixer/o"),
        linear("mlp.fc1", "ffn/up"),
        linear("mlp.fc2", "ffn/down"),
    )
)


def _attention(disk, path, names=("to_q", "to_k", "to_v", "to_out.0"), norms=("norm_q", "norm_k"), stream=""):
    """The projections of an attention, and its norms of queries and keys."""
    pairs = [
        pair
        for old, new in zip(names, "qkvo", strict=True)
        for pair in linear(f"{disk}.{old}", f"{path}/{stream}{new}").items()
    ]
    pairs += [
        pair
        for old, new in zip(norms, "qk", strict=True)
        for pair in norm(f"{disk}.{old}", f"{path}/{stream}{new}_norm").items()
    ]
    return dict(pairs)


# Wan of diffusers. A layer is a block of self-attention, and one of cross-attention and the ffn.
WAN = (
    {"patch_embedding.weight": (("patch/kernel",), "video_patch"), "patch_embedding.bias": (("patch/bias",), "same")}
    | linear("condition_embedder.time_embedder.linear_1", "time/0")
    | linear("condition_embedder.time_embedder.linear_2", "time/2")
    | linear("condition_embedder.time_proj", "modulation")
    | linear("condition_embedder.text_embedder.linear_1", "text/0")
    | linear("condition_embedder.text_embedder.linear_2", "text/2")
    | {"scale_shift_table": (("final/modulation/table",), "tables")}
    | linear("proj_out", "final")
    | within(
        "blocks.{layer}.",
        {"scale_shift_table": (("block_0/modulation/table", "block_1/modulation/table"), "tables")},
        _attention("attn1", "block_0/mixer"),
        _attention("attn2", "block_1/mixer"),
        norm("norm2", "block_1/mixer_norm"),
        linear("ffn.net.0.proj", "block_1/ffn/up"),
        linear("ffn.net.2", "block_1/ffn/down"),
    )
)

# Stable Diffusion 3 of diffusers.
SD3 = (
    patches("pos_embed.proj", "patch")
    | linear("time_text_embed.timestep_embedder.linear_1", "time/0")
    | linear("time_text_embed.timestep_embedder.linear_2", "time/2")
    | linear("time_text_embed.text_embedder.linear_1", "pooled/0")
    | linear("time_text_embed.text_embedder.linear_2", "pooled/2")
    | linear("context_embedder", "text")
    | linear("norm_out.linear", "final/modulation", layout="scale_shift")
    | linear("proj_out", "final")
    | within(
        "transformer_blocks.{layer}.",
        linear("norm1.linear", "modulation"),
        linear("norm1_context.linear", "mixer/text_modulation", layout="scale_shift"),
        _attention("attn", "mixer"),
        _attention(
            "attn",
            "mixer",
            ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            ("norm_added_q", "norm_added_k"),
            "text_",
        ),
        _attention("attn2", "mixer_1"),
        linear("ff.net.0.proj", "ffn/up"),
        linear("ff.net.2", "ffn/down"),
        linear("ff_context.net.0.proj", "mixer/text_ffn/up"),
        linear("ff_context.net.2", "mixer/text_ffn/down"),
    )
)


def _fused_attention(disk, path, stream=""):
    """An attention whose queries, keys and values are rows of one weight."""
    norms = norm(f"{disk}.ln_q", f"{path}/{stream}q_norm") | norm(f"{disk}.ln_k", f"{path}/{stream}k_norm")
    qkv = linear(f"{disk}.qkv", *(f"{path}/{stream}{name}" for name in "qkv"))
    return qkv | norms | linear(f"{disk}.proj", f"{path}/{stream}o")


# Stable Diffusion 3 as it was published: in a single file.
SD3_SINGLE_FILE = within(
    "model.diffusion_model.",
    patches("x_embedder.proj", "patch"),
    linear("t_embedder.mlp.0", "time/0"),
    linear("t_embedder.mlp.2", "time/2"),
    linear("y_embedder.mlp.0", "pooled/0"),
    linear("y_embedder.mlp.2", "pooled/2"),
    linear("context_embedder", "text"),
    linear("final_layer.adaLN_modulation.1", "final/modulation"),
    linear("final_layer.linear", "final"),
    within(
        "joint_blocks.{layer}.",
        linear("x_block.adaLN_modulation.1", "modulation"),
        linear("context_block.adaLN_modulation.1", "mixer/text_modulation"),
        _fused_attention("x_block.attn", "mixer"),
        _fused_attention("context_block.attn", "mixer", "text_"),
        _fused_attention("x_block.attn2", "mixer_1"),
        linear("x_block.mlp.fc1", "ffn/up"),
        linear("x_block.mlp.fc2", "ffn/down"),
        linear("context_block.mlp.fc1", "mixer/text_ffn/up"),
        linear("context_block.mlp.fc2", "mixer/text_ffn/down"),
    ),
)
