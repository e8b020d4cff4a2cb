"""The study's shapes: the parameters of every architecture, by a formula written here and by the model's own tree."""

import jax
import pytest

from configs import attention
from efficientllm import model
from efficientllm.registry import build

SIZES = ("0.5b", "1.5b", "3b")


def total(config, size):
    config.model.size, config.model.parameters_of = size, ""
    lm = model.from_config(config.model)
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(lm)))


def around(size, ffn, norms=2):
    """Embedding, final norm, and each layer's norms and ffn."""
    return size.vocab_size * size.dim + size.dim + size.num_layers * (norms * size.dim + ffn)


def swiglu(size):
    return 3 * size.dim * size.hidden


def attends(size, heads, kv_heads):
    """Projections and their biases."""
    q, kv = heads * size.head_dim, kv_heads * size.head_dim
    return size.dim * (2 * q + 2 * kv) + q + 2 * kv


@pytest.mark.parametrize("size", SIZES)
def test_attention(size):
    shape = build("size", size)
    N, D, H, K = shape.num_layers, shape.dim, shape.num_heads, shape.head_dim
    R, P = 4 * K, K // 2
    latent = D * H * (K + P) + D * (R + P) + R + R * H * 2 * K + H * K * D
    mixer = {
        "mha": attends(shape, H, H),
        "gqa": attends(shape, H, shape.num_kv_heads),
        "mqa": attends(shape, H, 1),
        "window": attends(shape, H, shape.num_kv_heads),
        "moba": attends(shape, H, shape.num_kv_heads) - K * (H + 2 * shape.num_kv_heads),  # no biases
        "mla": latent,
    }
    for name, each in mixer.items():
        found = total(attention.get_config(name), size)
        assert found == around(shape, swiglu(shape)) + N * each, name
