"""Folders of random AutoencoderKLs in the format of diffusers, written without it."""

import json

import flax.traverse_util
import numpy as np
from safetensors.numpy import save_file

from efficientllm.autoencoders import kl, kl_folder
from efficientllm.autoencoders.kl_network import KLShape

TINY = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.25,
    "shift_factor": 0.125,
    "force_upcast": True,
}
STABLE_DIFFUSION = KLShape()
STABLE_DIFFUSION_3 = KLShape(latent_channels=16, quant=False, post_quant=False)


def tensors(config=TINY, seed=0):
    """Random tensors by their names in diffusers, of a scale that keeps activations near 1."""
    draw = np.random.default_rng(seed)
    params = kl.abstract_params(kl_folder.describe_config(config, "config.json", "float32").shape)
    made = {}
    for leaf in kl_folder.leaves_of(params).values():
        name, shape = leaf.template, leaf.disk_shape
        values = draw.normal(size=shape) * (0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)
        is_scale = "norm" in name and name.endswith("weight")
        made[name] = (values + is_scale).astype(np.float32)
    return made


def save(folder, config=TINY, **changes):
    """Writes config.json and the tensors; `changes` are tensors by name, None to leave one out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    saved = {name: tensor for name, tensor in (tensors(config) | changes).items() if tensor is not None}
    save_file(saved, folder / "diffusion_pytorch_model.safetensors")
    return folder


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")
