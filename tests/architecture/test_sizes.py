"""Parameter counts of the study's sizes, by formula and by the model's tree, for every architecture."""

import math

import jax
import pytest

from configs import attention, mixers
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.registry import build

SIZES = ("0.5b", "1.5b", "3b")


def total(config, size):
    config.model.size, config.model.parameters_of = size, ""
    lm = from_config.from_config(config.model)
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
    G = shape.num_kv_heads
    compressor = 32 * K + 32 * K * 2 * K + 2 * K * K
    latent = D * H * (K + P) + D * (R + P) + R + R * H * 2 * K + H * K * D
    mixer = {
        "mha": attends(shape, H, H),
        "gqa": attends(shape, H, G),
        "mqa": attends(shape, H, 1),
        "window": attends(shape, H, G),
        "moba": attends(shape, H, G) - K * (H + 2 * G),  # no biases
        "mla": latent,
        "nsa": D * (2 * H * K + 6 * G * K + 3 * H) + 2 * compressor,
    }
    for name, spec in mixer.items():
        config = attention.get_config(name)
        config.model.mixer = name if name == "nsa" else config.model.mixer  # the paper's blocks
        count = total(config, size)
        assert count == around(shape, swiglu(shape)) + N * spec, name


@pytest.mark.parametrize("size", SIZES)
def test_beside_attention(size):
    shape = build("size", size)
    D, F, V = shape.dim, shape.hidden, shape.vocab_size
    C, states = 2 * D, 16  # Mamba's inner channels
    rank = math.ceil(D / 16)
    mamba = 3 * D * C + C * (rank + 2 * states) + rank * C + C * (4 + 1 + states + 2)
    states, heads = 64, C // 64
    mamba2 = 3 * D * C + D * (2 * states + heads) + 5 * (C + 2 * states) + 3 * heads + C
    ranks = sum(max(32, round(width / 32) * 32) for width in (1.8 * D**0.5, 1.8 * D**0.5, 1.3 * D**0.5, 0.6 * D**0.8))
    rwkv = 4 * D * D + 2 * D * ranks + 14 * D + D + 2 * D * F
    pythia = 4 * D * D + 4 * D + 2 * D * F + F + D
    expected = {
        "mamba": around(shape, 2 * mamba),
        "mamba2": around(shape, 2 * mamba2),
        "rwkv": around(shape, rwkv, norms=4) + 3 * D,  # norms have biases, and one follows the embedding
        "pythia": around(shape, pythia, norms=4) + D + V * D,
    }
    assert {name: total(mixers.get_config(name), size) for name in expected} == expected
