"""Folders of random diffusion transformers: of diffusers, of its pipeline, and with the published names."""

import functools
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "num_embeds_ada_norm": 10,
    "sample_size": 8,
    "patch_size": 2,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
_PUBLISHED = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_OF_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


@functools.cache
def reference(**changes):
    """A random model of diffusers whose every parameter is jittered; all blocks have the first's embeddings."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**TINY | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        first, *others = model.transformer_blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model.eval()


@functools.cache
def saved(**changes):
    """The folder that diffusers saves the `reference` to. Tests do not change it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    reference(**changes).save_pretrained(folder)
    return folder


def published_reference(**changes):
    """The published model: that of diffusers with other frequencies and one eps."""
    model = reference(norm_eps=1e-6, **changes)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def save_published(folder, config=True, **changes):
    """Writes the tensors of `published_reference` under the published names; returns the folder."""
    model = published_reference(**changes)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {}
    for old, new in _PUBLISHED.items():
        tensors |= {f"{new}.{end}": state[f"{old}.{end}"] for end in ("weight", "bias") if f"{old}.{end}" in state}
    for i in range(model.config.num_layers):
        for old, new in _OF_BLOCK.items():
            for end in ("weight", "bias"):
                tensors[f"blocks.{i}.{new}.{end}"] = state[f"transformer_blocks.{i}.{old}.{end}"]
        for end in ("weight", "bias"):
            qkv = [state[f"transformer_blocks.{i}.attn1.to_{name}.{end}"] for name in "qkv"]
            tensors[f"blocks.{i}.attn.qkv.{end}"] = np.concatenate(qkv)
    tensors["pos_embed"] = model.pos_embed.pos_embed.numpy()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        arguments = {"input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
        (folder / "config.json").write_text(json.dumps({"_class_name": "DiT"} | arguments))
    return folder


def pipeline(folder):
    """A pipeline's folder with the `reference` as its transformer."""
    shutil.copytree(saved(), folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": {}}))
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (folder / "vae" / "run_me.py").write_text("raise SystemExit")
    return folder


def edit(folder, new, config=None, **tensors):
    """Copies a folder to `new` with other values in config.json and other tensors, None to leave one out."""
    shutil.copytree(folder, new)
    file = next(new.glob("*.safetensors"))
    values = {name: value for name, value in (load_file(file) | tensors).items() if value is not None}
    save_file(values, file)
    (new / "config.json").write_text(json.dumps(json.loads((new / "config.json").read_text()) | (config or {})))
    return new
