"""Folders of random AutoencoderKLWans in the format of diffusers, written without it."""

import functools
import json

import numpy as np
from safetensors.numpy import save_file

from efficientllm.autoencoders import wan, wan_folder

TINY = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.42.1",
    "attn_scales": [],
    "base_dim": 4,
    "decoder_base_dim": None,
    "dim_mult": [1, 2, 2],
    "dropout": 0.0,
    "in_channels": 3,
    "is_residual": False,
    "latents_mean": [0.1, -0.2, 0.3, 0.5],
    "latents_std": [1.1, 0.7, 2.0, 1.6],
    "num_res_blocks": 1,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 4,
    "scale_factor_temporal": 2,
    "temperal_downsample": [False, True],
    "z_dim": 4,
}
TINIER = TINY | {"dim_mult": [1, 2], "temperal_downsample": [True]}
NAME = "encoder.conv_in.weight"


def tensors(config=TINY, seed=0):
    """Random tensors by their names in diffusers, of a scale that keeps activations near 1."""
    draw = np.random.default_rng(seed)
    made = {}
    for leaf in _leaves(wan_folder.describe_config(config, "config.json", "float32").shape).values():
        name, size = leaf.template, leaf.disk_shape
        is_scale = name.endswith("gamma")
        deviation = 0.1 if is_scale or len(size) == 1 else np.prod(size[1:]) ** -0.5
        made[name] = (draw.normal(size=size) * deviation + is_scale).astype(np.float32)
    return made


@functools.cache
def _leaves(shape):
    return wan_folder.leaves_of(wan.abstract_params(shape), shape.layers)


def save(folder, config=TINY, **changes):
    """Writes config.json and the tensors; `changes` are tensors by name, None to leave one out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    saved = {name: tensor for name, tensor in (tensors(config) | changes).items() if tensor is not None}
    save_file(saved, folder / "diffusion_pytorch_model.safetensors")
    return folder
