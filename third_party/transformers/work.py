"""Shared workload: one shape, one set of initial weights, one stream of batches and one optimizer setting."""

import dataclasses

import numpy as np

OPTIMISER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}  # decay on every parameter
CLIP = 1.0
NORM_EPS = 1e-6
ROPE_BASE = 1e6


@dataclasses.dataclass(frozen=True)
class Shape:
    """A dense Qwen2-style decoder: GQA with q/k/v biases, SwiGLU, RMSNorm, rotary positions, tied embeddings."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int

    @property
    def head_dim(self):
        return self.dim // self.heads

    @property
    def parameters(self):
        return sum(int(np.prod(shape)) for shape in weight_shapes(self).values())


SHAPES = {
    "tiny": Shape(layers=2, dim=32, heads=4, kv_heads=2, hidden=48, vocab=128),
    "small": Shape(layers=6, dim=256, heads=8, kv_heads=4, hidden=768, vocab=2048),
    "10m": Shape(layers=8, dim=256, heads=4, kv_heads=2, hidden=1024, vocab=8192),
    "100m": Shape(layers=12, dim=768, heads=12, kv_heads=4, hidden=2048, vocab=32000),
}


def weight_shapes(shape):
    """`{transformers' name: shape}`; Linear weights are [out, in]."""
    D, kv = shape.dim, shape.kv_heads * shape.head_dim
    block = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (D, D),
        "self_attn.q_proj.bias": (D,),
        "self_attn.k_proj.weight": (kv, D),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, D),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (D, D),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (shape.hidden, D),
        "mlp.up_proj.weight": (shape.hidden, D),
        "mlp.down_proj.weight": (D, shape.hidden),
    }
    layers = {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in block.items()}
    return {"model.embed_tokens.weight": (shape.vocab, D)} | layers | {"model.norm.weight": (D,)}


def initial_weights(shape, seed=0):
    """Random float32 weights by transformers' names. Biases and norms are random too, so that a mix-up shows."""
    noise = np.random.default_rng(seed)
    weights = {}
    for name, size in weight_shapes(shape).items():
        scale = 0.02 if "embed" in name or len(size) == 1 else size[1] ** -0.5
        weights[name] = scale * noise.standard_normal(size, np.float32) + np.float32("norm" in name)
    return weights


def batch_tokens(shape, batch, length, step):
    """Random tokens `[batch, length]` of a step. Position t predicts token t + 1 of its row."""
    return np.random.default_rng(step).integers(0, shape.vocab, (batch, length))
