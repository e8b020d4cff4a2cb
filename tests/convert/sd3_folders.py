"""Folders of random Stable Diffusion 3 transformers: of diffusers, of its pipeline, and as a single file."""

import functools
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from efficientllm.embeds.condition import Condition

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "caption_projection_dim": 24,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 6,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
BRANCHES = {
    "dual": {},
    "sd3.0": {"dual_attention_layers": (), "qk_norm": None},
    "last-dual": {"dual_attention_layers": (1, 2), "num_layers": 4, "sample_size": 12},
}
_NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_OF_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


@functools.cache
def reference(branch="dual"):
    """A random model of diffusers whose every parameter is jittered."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**TINY | BRANCHES[branch])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@functools.cache
def saved(branch="dual"):
    """The folder that diffusers saves the `reference` to. Tests do not change it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    reference(branch).save_pretrained(folder)
    return folder


def pipeline(folder):
    """A pipeline's folder with the `reference` as its transformer, and a scheduler."""
    shutil.copytree(saved(), folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(folder / "scheduler")
    return folder


def save_single_file(folder, branch="dual"):
    """Writes the tensors of the `reference` under the published names, beside one of an autoencoder."""
    model, tensors = reference(branch), {}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def swap(x):  # diffusers has the scale before the shift
        return np.concatenate(np.split(x, 2)[::-1])

    def move(old, new, change=lambda x: x):
        for name in [name for name in state if name == old or name.startswith(f"{old}.")]:
            tensors[f"model.diffusion_model.{new}{name.removeprefix(old)}"] = change(state.pop(name))

    for old, new in _NAMES.items():
        move(old, new)
    move("norm_out.linear", "final_layer.adaLN_modulation.1", swap)
    last = model.config.num_layers - 1
    for i in range(last + 1):
        for new, parts in _FUSED.items():
            for end in ("weight", "bias"):
                names = [f"transformer_blocks.{i}.{part}.{end}" for part in parts]
                if names[0] in state:
                    fused = np.concatenate([state.pop(name) for name in names])
                    tensors[f"model.diffusion_model.joint_blocks.{i}.{new}.{end}"] = fused
        for old, new in _OF_BLOCK.items():
            is_swapped = i == last and old == "norm1_context.linear"
            move(f"transformer_blocks.{i}.{old}", f"joint_blocks.{i}.{new}", swap if is_swapped else lambda x: x)
    assert not state
    folder.mkdir(exist_ok=True)
    tensors["first_stage_model.encoder.conv_in.bias"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "sd3.safetensors", metadata={"format": "pt"})
    return folder


def inputs(model, size=(8, 12), texts=7):
    """Latents that are not square, two levels, and a condition."""
    draw, config = np.random.default_rng(0), model.config
    x_BhwC = draw.normal(size=(2, *size, config.in_channels)).astype(np.float32)
    text_BSE = draw.normal(size=(2, texts, config.joint_attention_dim)).astype(np.float32)
    pooled_BE = draw.normal(size=(2, config.pooled_projection_dim)).astype(np.float32)
    return x_BhwC, np.array([999.0, 37.5], np.float32), Condition(text_BSE=text_BSE, pooled_BE=pooled_BE)
