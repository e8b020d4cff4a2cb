"""Building pieces of diffusion transformers against diffusers: positions, patches, noise levels, modulations."""

import types

import jax
import numpy as np
import pytest

from efficientllm import registry
from efficientllm.embeds.conditioning import TimeEmbedding, level_waves
from efficientllm.layers import LayerNorm
from efficientllm.ops import patches

torch = pytest.importorskip("torch")
embeddings = pytest.importorskip("diffusers.models.embeddings")

pytestmark = pytest.mark.quick
LEVELS = np.array([0.0, 1.0, 37.5, 512.0, 999.0], np.float32)
D = 12


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def jittered(module):
    """The module in evaluation, with noise on every parameter."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += torch.from_numpy(0.3 * noise(*parameter.shape, seed=i))
    return module.eval()


def linear(layer):
    return {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}


@pytest.mark.parametrize("denominator", [128, 127])
def test_waves_of_noise_levels(denominator):
    theirs = embeddings.get_timestep_embedding(
        torch.from_numpy(LEVELS), 256, flip_sin_to_cos=True, downscale_freq_shift=128 - denominator
    )
    # One rounding of an angle of 999 is 3e-5; two implementations of exp may differ by one of the frequency.
    np.testing.assert_allclose(level_waves(LEVELS, denominator), theirs.numpy(), rtol=0, atol=6.2e-5)


def test_time_embedding():
    theirs = jittered(embeddings.TimestepEmbedding(256, D))
    waves = embeddings.get_timestep_embedding(torch.from_numpy(LEVELS), 256, True, 0)
    params = {"0": linear(theirs.linear_1), "2": linear(theirs.linear_2)}
    vectors = TimeEmbedding(D, "float32").apply({"params": params}, LEVELS)
    np.testing.assert_allclose(vectors, theirs(waves).detach().numpy(), rtol=1e-5, atol=2e-4)


def test_positions_of_a_square_grid():
    theirs = embeddings.get_2d_sincos_pos_embed(16, 7, base_size=7)
    np.testing.assert_allclose(patches.sincos_2d((7, 7), 16), theirs.numpy(), rtol=0, atol=6e-8)


@pytest.mark.parametrize("side", [384, 192])
def test_positions_cropped_from_the_table_of_sd3(side):
    theirs = embeddings.PatchEmbed(128, 128, 2, 16, 16, pos_embed_max_size=side)
    table_TD = patches.sincos_2d((32, 20), 16, scale=64 / side, table=side)
    # diffusers rounds coordinates up to 37 to float32: 2e-6.
    np.testing.assert_allclose(table_TD, theirs.cropped_pos_embed(64, 40)[0].numpy(), rtol=0, atol=2.1e-6)


def test_patches_multiply_a_convolution_s_weight_as_it_lies():
    theirs = jittered(embeddings.PatchEmbed(8, 8, 2, 4, D))
    images = noise(2, 8, 8, 4)
    x_BTc = patches.patchify(images, 2)
    weight = theirs.proj.weight.detach().numpy().reshape(D, -1)
    vectors = x_BTc @ weight.T + theirs.proj.bias.detach().numpy() + patches.sincos_2d((4, 4), D)
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-5)


def affine(modulation, params, condition):
    ctx = types.SimpleNamespace(condition_BD=condition)
    return registry.build("modulation", f"{modulation}(precision='float32')").apply({"params": params}, ctx, D)


def layer_norm(x):
    return LayerNorm(1e-6).apply({"params": {"scale": np.ones(D, np.float32), "bias": np.zeros(D, np.float32)}}, x)


def test_linear_is_the_modulation_of_dit():
    from diffusers.models.normalization import AdaLayerNormZero

    theirs = jittered(AdaLayerNormZero(D))
    x, condition = noise(2, 3, D), noise(2, D, seed=1)
    modulated, *others = (
        tensor.detach().numpy() for tensor in theirs(torch.from_numpy(x), emb=torch.from_numpy(condition))
    )
    mixer, ffn = affine("linear", linear(theirs.linear), condition)
    np.testing.assert_allclose(mixer.modulate(layer_norm(x)), modulated, rtol=1e-5, atol=1e-5)
    for ours, expected in zip((mixer.gate, ffn.shift, ffn.scale, ffn.gate), others, strict=True):
        np.testing.assert_allclose(ours[:, 0], expected, rtol=1e-5, atol=1e-5)


class First(torch.nn.Module):
    def forward(self, x, *_):
        return x


class Zeros(torch.nn.Module):
    def forward(self, x, *_):
        return torch.zeros_like(x)


def test_table_is_the_modulation_of_wan():
    """A block of Wan whose attention and ffn are the identity, and whose cross-attention adds nothing."""
    from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding, WanTransformerBlock

    block = jittered(WanTransformerBlock(D, 8, 2))
    block.attn1 = block.ffn = First()
    block.attn2 = Zeros()
    embedder = jittered(WanTimeTextImageEmbedding(D, 256, 6 * D, 16))
    x, text = noise(5, 3, D), torch.zeros(5, 1, 16)
    condition, projected, *_ = embedder(torch.from_numpy(LEVELS), text)
    expected = block(torch.from_numpy(x), None, projected.unflatten(1, (6, -1)), None).detach().numpy()
    shared = registry.build("modulation", "table(precision='float32')")
    projection = {"params": linear(embedder.time_proj)}
    condition = jax.jit(lambda c: shared.apply(projection, c, method="project"))(condition.detach().numpy())
    np.testing.assert_allclose(condition, projected.detach().numpy(), rtol=1e-5, atol=1e-5)
    for branch in affine("table", {"table": block.scale_shift_table[0].detach().numpy()}, condition):
        x = branch.add(x, branch.modulate(layer_norm(x)))
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("K, sections, grid", [(128, (22, 21, 21), (21, 30, 52)), (16, (4, 2, 2), (3, 5, 4))])
def test_rotation_of_wan(K, sections, grid):
    """Interleaved pairs of frames, rows and columns, each with frequencies of their own; 480p has 21 x 30 x 52 tokens.

    Heads of ones and zeros read the table: cosines and sines differ by the rounding to float32 alone.
    """
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    frames, rows, columns = grid
    latents = torch.zeros(1, 1, frames, 2 * rows, 2 * columns)
    cos, sin = (table.numpy()[..., ::2] for table in WanRotaryPosEmbed(K, (1, 2, 2), 1024)(latents))
    position = registry.build(
        "position", f"rope(base=10000.0, sections={sections}, restart=True, interleaved=True, table=1024)", parent=None
    )
    x_BTHK = np.broadcast_to(np.tile(np.float32([1, 0]), K // 2), (1, frames * rows * columns, 1, K))
    rotated = position.rotate(x_BTHK, patches.coordinates(grid)[None])
    np.testing.assert_allclose(rotated[..., ::2], cos, rtol=0, atol=6e-8)
    np.testing.assert_allclose(rotated[..., 1::2], sin, rtol=0, atol=6e-8)
