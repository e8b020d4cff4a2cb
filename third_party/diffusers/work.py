"""Shared workload: one shape, one set of initial weights, one stream of noisy pictures and one optimizer setting."""

import dataclasses

import numpy as np

OPTIMISER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # DiT's
CLASSES = 62


@dataclasses.dataclass(frozen=True)
class Shape:
    """A class-conditional DiT on pictures of `side` x `side` pixels, that predicts as many channels as it is given."""

    layers: int
    heads: int
    head_dim: int
    patch: int
    side: int
    channels: int = 3

    @property
    def dim(self):
        return self.heads * self.head_dim

    @property
    def tokens(self):
        return (self.side // self.patch) ** 2


SHAPES = {
    "tiny": Shape(layers=2, heads=2, head_dim=16, patch=4, side=16),
    "small": Shape(layers=6, heads=4, head_dim=64, patch=4, side=32),
    "b4": Shape(layers=12, heads=12, head_dim=64, patch=4, side=32, channels=4),
}


def weight_shapes(shape):
    """`{diffusers' name: shape}` without the copies of the embedders that every block has; Linear is [out, in]."""
    D, width = shape.dim, shape.channels * shape.patch**2

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(i):
        name = f"transformer_blocks.{i}"
        attention = [linear(f"{name}.attn1.{part}", D, D) for part in ("to_q", "to_k", "to_v", "to_out.0")]
        ff = [linear(f"{name}.ff.net.0.proj", 4 * D, D), linear(f"{name}.ff.net.2", D, 4 * D)]
        return [linear(f"{name}.norm1.linear", 6 * D, D), *attention, *ff]

    ends = [
        {"pos_embed.proj.weight": (D, shape.channels, shape.patch, shape.patch), "pos_embed.proj.bias": (D,)},
        linear("time.linear_1", D, 256),
        linear("time.linear_2", D, D),
        {"labels.weight": (CLASSES + 1, D)},
        linear("proj_out_1", 2 * D, D),
        linear("proj_out_2", width, D),
    ]
    parts = [*ends, *(part for i in range(shape.layers) for part in block(i))]
    return {name: size for part in parts for name, size in part.items()}


def initial_weights(shape, seed=0):
    """Random float32 weights by diffusers' names: zeros, which modulations start from, would hide a mix-up."""
    noise = np.random.default_rng(seed)
    return {
        name: (0.02 if len(size) == 1 else 0.5 * np.prod(size[1:]) ** -0.5) * noise.standard_normal(size, np.float32)
        for name, size in weight_shapes(shape).items()
    }


def batch(shape, rows, step):
    """A step's `noisy` pictures `[B, h, w, C]`, their `levels` and `labels` `[B]`, and the `target` of the model."""
    noise = np.random.default_rng(step)
    size = (rows, shape.side, shape.side, shape.channels)
    images, added = noise.standard_normal(size, np.float32), noise.standard_normal(size, np.float32)
    sigma = noise.random((rows, 1, 1, 1), np.float32)
    return {
        "noisy": (1 - sigma) * images + sigma * added,
        "levels": np.round(1000 * sigma[:, 0, 0, 0]),
        "labels": noise.integers(0, CLASSES, rows).astype(np.int32),
        "target": added - images,
    }
