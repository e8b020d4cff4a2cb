"""Shared workload of tuning: noisy latents with states of texts, the adapter, and the optimizer's setting."""

import json
import pathlib

import numpy as np

RANK = ALPHA = 16
OPTIMISER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
# Of the attention of both streams of Stable Diffusion 3, or of self- and cross-attention of Wan.
PEFT_MODULES = r".*attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
OUR_TARGET = r"/mixer\w*/(text_)?[qkvo]/"
SOLVER_STEPS, SHIFT, GUIDANCE = 28, 3.0, 4.5
TOKENS = 96  # of a text
FRAMES, SIDE = 3, 8  # latents of a clip, whose transformer reads any size


def read_config(pipeline):
    """The transformer's config.json."""
    return json.loads((pathlib.Path(pipeline) / "transformer" / "config.json").read_text())


def latent_shape(config):
    """`(h, w, C)` of pictures, `(F, h, w, C)` of clips."""
    if "sample_size" in config:
        return (config["sample_size"], config["sample_size"], config["in_channels"])
    return (FRAMES, SIDE, SIDE, config["in_channels"])


def batch(config, rows, step):
    """A step's arrays, channels last: `noisy` latents, their `levels` `[B]`, the `target`, and states of texts.

    `text` `[B, S, E]`, with `pooled` `[B, P]` where the model reads them, and the negative ones, `no_text` and
    `no_pooled`.
    """
    noise, size = np.random.default_rng(step), (rows, *latent_shape(config))
    latents, added = (noise.standard_normal(size, np.float32) for _ in range(2))
    sigma = noise.random((rows, *(1,) * (len(size) - 1)), np.float32)
    arrays = {
        "noisy": (1 - sigma) * latents + sigma * added,
        "levels": 1000 * sigma.reshape(rows),
        "target": added - latents,
    }
    widths = {"text": (TOKENS, config.get("joint_attention_dim") or config.get("text_dim"))}
    if "pooled_projection_dim" in config:
        widths["pooled"] = (config["pooled_projection_dim"],)
    for name, width in widths.items():
        arrays[name], arrays[f"no_{name}"] = (noise.standard_normal((rows, *width), np.float32) for _ in range(2))
    return arrays
